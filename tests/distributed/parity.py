"""How far several processes are from one, printed as a table.

python -m tests.distributed.parity

The largest difference of any element of the output and of all gradients from those of one process
in float64. bfloat16 is told by how much of what it may be off it is: twice the worst error of plain
torch in bfloat16, and two additions (``tests.kit.numerics``).
"""

from collections.abc import Sequence as Rows

import torch
from rich.console import Console
from rich.table import Table

from hunyuan_fast.distributed.shards import TokenShards
from tests.distributed import test_context_parallel as of_transformer
from tests.distributed import test_ring_attention as of_attention
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


def _show(title: str, columns: Rows[str], rows: Rows[Rows[str]]) -> None:
    table = Table("scheme", "case", *columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
