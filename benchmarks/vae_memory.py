"""Draw the memory of decoding against the length of the clip, for several budgets.

    python -m benchmarks.vae_memory                    measure what is missing, and draw
    python -m benchmarks.vae_memory --lengths          draw what has been measured

Released sizes with random weights, fp32 on the CPU, 256 x 256. Lines are planned peaks; points are
measured, each in a process of its own, and kept in a file beside the picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.vae_resident import SIZES
from hunyuan_fast.models.vae.budget import read_bytes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.planner import least_budget, plan_decode

_PICTURE = Path(__file__).parents[1] / "docs" / "images" / "vae-memory.png"
_CONFIG = VAEConfig(**SIZES["real"])
_LATENT = 32
_LENGTHS = range(1, 66, 4)
_BUDGETS = {"4GiB": "#0550ae", "2GiB": "#1a7f37", "1GiB": "#9a6700", "512MiB": "#b3261e"}
_NONE = "none"
_GIB = 1 << 30


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vae_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[1, 9, 17], help="to measure")
    parser.add_argument("--budgets", nargs="*", default=[_NONE, *_BUDGETS], help="to measure")
    options = parser.parse_args()
    path = _PICTURE.with_suffix(".json")
    points: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
    for length in options.lengths:
        for budget in options.budgets:
            measured = points.setdefault(budget, {})
            if str(length) not in measured and _works(length, budget):
                measured[str(length)] = _measure(length, budget)
                path.write_text(json.dumps(points, indent=2) + "\n")
                print(f"{length} frames, {budget}: {measured[str(length)] / _GIB:.2f} GiB")
    _draw(points)


def _shape(length: int) -> tuple[int, ...]:
    return (1, _CONFIG.latent_channels, (length - 1) // 4 + 1, _LATENT, _LATENT)


def _works(length: int, budget: str) -> bool:
    if budget == _NONE:
        return True
    least = least_budget("decode", _CONFIG, _shape(length), torch.float32)
    return least <= read_bytes(budget)


def _measure(length: int, budget: str) -> int:
    shape = ",".join(map(str, _shape(length)))
    command = [sys.executable, "-m", "benchmarks.vae_resident", "real", "decode", shape, budget]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    if not done.stdout:
        raise RuntimeError("this system does not tell the highest resident size of a process")
    return int(done.stdout.split()[1])


def _planned(budget: str | None) -> tuple[list[int], list[float]]:
    """Lengths at which the budget works, and planned peaks in GiB; None: maps are whole."""
    lengths, peaks = [], []
    for length in _LENGTHS:
        if budget is None or _works(length, budget):
            count = 1 << 50 if budget is None else read_bytes(budget)
            plan = plan_decode(_CONFIG, _shape(length), torch.float32, count)
            lengths.append(length)
            peaks.append(plan.peak / _GIB)
    return lengths, peaks


def _draw(points: dict[str, dict[str, int]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis: Any = figure.subplots()
    lines = {_NONE: "#57606a", **_BUDGETS}
    for budget, color in lines.items():
        bound = None if budget == _NONE else budget
        name = "no budget" if bound is None else budget
        axis.plot(*_planned(bound), color=color, label=f"planned, {name}", linewidth=1.5)
        measured = sorted((int(n), grown / _GIB) for n, grown in points.get(budget, {}).items())
        if measured:
            axis.plot(*zip(*measured, strict=True), "o", color=color, label=f"measured, {name}")
    least = [least_budget("decode", _CONFIG, _shape(n), torch.float32) / _GIB for n in _LENGTHS]
    axis.plot(_LENGTHS, least, color="black", linestyle=":", label="least budget")
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("frames of the clip, 256 x 256")
    axis.set_ylabel("GiB beside input and weights")
    axis.set_title("Decoding with the released sizes in fp32 on the CPU", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    _PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(_PICTURE, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
