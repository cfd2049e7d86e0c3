"""How far implementations of attention are from the truth, and from each other.

python -m benchmarks.agreement                     every implementation that this machine has
python -m benchmarks.agreement --dtype float16     in another precision
TRITON_INTERPRET=1 python -m benchmarks.agreement  with Triton's interpreter, without a GPU

The truth is the reference with more digits. Tables are Markdown.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from hunyuan_fast import dispatch
from hunyuan_fast.kernels.rope3d_attention.problems import Inputs, Problem

OP = "rope3d_attention"
_NAMES = ("out", "lse", "dq", "dk", "dv")
_VIDEO = 133
# Video tokens and texts of different lengths: none, one token, all of 64; no tile divides the sums.
_LENGTHS = (None, (_VIDEO, _VIDEO + 1, _VIDEO + 64, _VIDEO + 30), (0, _VIDEO + 64, 1, 64))
_HEAD_DIMS = (64, 80, 96, 128, 256)


def problems(dtype: torch.dtype) -> list[Problem]:
    """Forward and backward, over head sizes and batches with different text lengths."""
    return [
        Problem(dtype, 4, _VIDEO + 64, 2, head_dim, lengths, training=True)
        for head_dim, lengths in product(_HEAD_DIMS, _LENGTHS)
    ]


def distances(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Of every result: root mean square relative to that of the truth; of lse the largest."""
    found = []
    for name, result, exact in zip(_NAMES, results, truth, strict=True):
        if name == "lse":
            apart = torch.where(exact.isneginf() & result.isneginf(), 0, result - exact)
            found.append(apart.abs().max().item())
        else:
            apart = (result.to(exact.dtype) - exact).square().mean().sqrt()
            found.append((apart / exact.square().mean().sqrt()).item())
    return found


def alone(dtype: torch.dtype, device: torch.device) -> dict[str, list[float] | str]:
    """Of every candidate the largest distances over all problems, or why there are none."""
    worst: dict[str, list[float] | str] = {}
    for problem in problems(dtype):
        inputs = problem.draw(device)
        truth = problem.truth(inputs)
        for name, impl in dispatch.choices(OP).items():
            reason = impl.supports(*inputs.arguments)
            if reason is not None:
                worst.setdefault(name, reason)
                continue
            found = distances(problem.run(impl, inputs), truth)
            before = worst.get(name)
            if isinstance(before, list):  # unlike that of Python, this maximum keeps a NaN
                found = torch.tensor([before, found], dtype=torch.float64).amax(0).tolist()
            worst[name] = found
    return worst


def mixed(
    names: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[tuple[str, str], float]:
    """Forward by one and backward by another: the error in parts of what rounding may cause."""
    loaded = dispatch.choices(OP)
    worst = dict.fromkeys(product(names, names), 0.0)
    for problem in problems(dtype):
        inputs = problem.draw(device)
        truth = problem.truth(inputs)
        for pair in worst:
            modules = [loaded[name] for name in pair]
            if all(each.supports(*inputs.arguments) is None for each in modules):
                error = problem.error(_run(*modules, inputs), truth)
                worst[pair] = max(worst[pair], error)
    return worst


def _run(first: ModuleType, second: ModuleType, inputs: Inputs) -> list[Tensor]:
    out, lse = first.forward(*inputs.arguments)
    return [out, lse, *second.backward(inputs.dout, out, lse, *inputs.arguments)]


def tables(dtype: torch.dtype, device: torch.device) -> str:
    """Both tables, and who is not in them."""
    found = alone(dtype, device)
    measured = {name: row for name, row in found.items() if isinstance(row, list)}
    lines = [
        f"{str(dtype)[6:]} on {dispatch.arch_of(device)}, {len(problems(dtype))} problems. "
        "Root mean square error over that of the truth; of lse the largest error.",
        "",
        f"| | {' | '.join(_NAMES)} |",
        f"|---|{'---:|' * len(_NAMES)}",
        *(f"| {n} | {' | '.join(f'{x:.2g}' for x in row)} |" for n, row in measured.items()),
        "",
        "Forward by the one on the left, backward by the one above: the largest error, in parts of "
        "what rounding may cause.",
        "",
        f"| | {' | '.join(measured)} |",
        f"|---|{'---:|' * len(measured)}",
    ]
    pairs = mixed(list(measured), dtype, device)
    for name in measured:
        lines.append(f"| {name} | {' | '.join(f'{pairs[name, n]:.2f}' for n in measured)} |")
    lines += ["", *(f"- {name}: {why}" for name, why in found.items() if isinstance(why, str))]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.kit.interpreter import install  # by itself it takes bfloat16 for integers

        install()
    print(tables(getattr(torch, options.dtype), torch.device(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
