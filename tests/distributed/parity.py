"""How far several processes are from one, printed as a table.

python -m tests.distributed.parity

The largest difference of any element of the output and of all gradients from those of one process
in float64. bfloat16 is told by how much of what it may be off it is: twice the worst error of plain
torch in bfloat16, and two additions (``tests.kit.numerics``). Windows and codes, which exchanged
heads alone have, are compared with one process in the same dtype: by the largest difference, codes
also by its root mean square as a share of what they cost.
"""

from collections.abc import Sequence as Rows

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hunyuan_fast.distributed.shards import TokenShards
from tests.distributed import test_context_parallel as of_transformer
from tests.distributed import test_ring_attention as of_attention
from tests.distributed import test_whole_sequences as of_sequences
from tests.distributed.attention_cases import (
    NAMES,
    SEQUENCES,
    largest_difference,
    one_process,
    whole,
)
from tests.kit.numerics import allowed_error
from tests.kit.ranks import RankPool, rank_pool


def main() -> None:
    """Run every scheme on every case, and print what comes out."""
    with rank_pool() as pool:
        _show("attention", ("float64", "float32", "bfloat16"), _attention(pool))
        _show("transformer", ("float64, relative",), _transformer(pool))
        _show("windows", ("difference",), _windows(pool))
        _show("codes", ("difference", "share of their cost"), _codes(pool))


def _attention(pool: RankPool) -> list[tuple[str, ...]]:
    rows = []
    for scheme, (function, ranks) in of_attention.SCHEMES.items():
        for case, sequence in SEQUENCES.items():
            shards = TokenShards.split(sequence.video, sequence.text, ranks)
            cells = []
            for dtype in (torch.float64, torch.float32):
                found = whole(pool.run(ranks, function, sequence, dtype), shards)
                exact = one_process(sequence, dtype, torch.float64)
                cells.append(f"{largest_difference(found, exact):.1e}")
            dtype = torch.bfloat16
            found = whole(pool.run(ranks, function, sequence, dtype), shards)
            exact = one_process(sequence, dtype, torch.float64)
            plain = one_process(sequence, dtype, dtype)
            share = max(
                float((found[name].double() - exact[name]).abs().max())
                / float(allowed_error(exact[name], plain[name], dtype))
                for name in NAMES
            )
            rows.append((scheme, case, *cells, f"{share:.0%} of allowed"))
    return rows


def _transformer(pool: RankPool) -> list[tuple[str, ...]]:
    rows = []
    for layout, options in of_transformer.LAYOUTS.items():
        for case, sizes in of_transformer.CASES.items():
            wanted = of_transformer.results(*of_transformer.parts(sizes))
            found = pool.run(options["cp"], of_transformer.shared, options, sizes, False)
            worst = max(
                float((rank[name] - x).abs().max()) / max(1.0, float(x.abs().max()))
                for rank in found
                for name, x in wanted.items()
            )
            rows.append((layout, case, f"{worst:.1e}"))
    return rows


def _windows(pool: RankPool) -> list[tuple[str, ...]]:
    rows = []
    sequence = of_sequences.SPARSE
    for ranks in (2, 3):
        shards = TokenShards.split(sequence.video, sequence.text, ranks)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            found = whole(pool.run(ranks, of_sequences.sparse_part, sequence, dtype), shards)
            one = of_sequences.sparse_alone(sequence, dtype, dtype)
            rows.append(
                (f"ulysses of {ranks}", str(dtype), f"{largest_difference(found, one):.1e}")
            )
    dtype = torch.float64
    for name, (heads, layout) in of_sequences.MODELS.items():
        one = of_sequences.of_model(heads, {}, "windows", dtype)
        ranks = layout["cp"] * layout.get("tp", 1)
        found = pool.run(ranks, of_sequences.of_model, heads, layout, "windows", dtype)
        worst = max(
            float((x - one[key]).abs().max()) / max(1.0, float(one[key].abs().max()))
            for rank in found
            for key, x in rank.items()
        )
        rows.append((f"transformer, {name}", f"{dtype}, relative", f"{worst:.1e}"))
    return rows


def _codes(pool: RankPool) -> list[tuple[str, ...]]:
    rows = []
    sequence = of_sequences.LONG
    for ranks in (2, 3):
        shards = TokenShards.split(sequence.video, sequence.text, ranks)
        for dtype in (torch.float32, torch.bfloat16):
            found = whole(pool.run(ranks, of_sequences.coded_part, dtype), shards)["out"]
            row = _beside_cost(found, *of_sequences.coded_alone(dtype))
            rows.append((f"ulysses of {ranks}", str(dtype), *row))
    dtype = torch.float32
    for name, (heads, layout) in of_sequences.MODELS.items():
        one, exact = (of_sequences.of_model(heads, {}, kind, dtype) for kind in ("fp8", "dense"))
        ranks = layout["cp"] * layout.get("tp", 1)
        first, *_ = pool.run(ranks, of_sequences.of_model, heads, layout, "fp8", dtype)
        row = _beside_cost(*(each["velocity"] for each in (first, one, exact)))
        rows.append((f"transformer, {name}", str(dtype), *row))
    return rows


def _beside_cost(found: Tensor, one: Tensor, exact: Tensor) -> tuple[str, str]:
    """The largest difference, and its root mean square in parts of what codes change."""
    difference, cost = (found - one).double(), (exact - one).double()
    share = float(difference.square().mean().sqrt() / cost.square().mean().sqrt())
    return f"{float(difference.abs().max()):.1e}", f"{share:.1e}"


def _show(title: str, columns: Rows[str], rows: Rows[Rows[str]]) -> None:
    table = Table("scheme", "case", *columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
