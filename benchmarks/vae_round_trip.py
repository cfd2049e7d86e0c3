"""A clip through the VAE within a memory budget and without: the same values, in how much memory.

    python -m benchmarks.vae_round_trip bikes.mp4 --frames 33 --size 256 --budget 3GiB

The released architecture with random weights, in fp32 on the CPU. Prints a row for each half: the
planned peak, how much the resident memory grew, the time, each also without a budget, and the
largest difference. The latents that are decoded are those encoded without a budget.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.bench_vae import with_random_weights
from benchmarks.kit.resident import growth
from hunyuan_fast.data.geometry import apply_fit, fit
from hunyuan_fast.data.video import read_video
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.budget import read_bytes, show_bytes
from hunyuan_fast.models.vae.planner import plan_decode, plan_encode


@dataclass
class Run:
    """What one call gave and took; grown: bytes, None where the system does not tell."""

    result: Tensor
    seconds: float
    grown: int | None


def measured(call: Callable[[], Tensor]) -> Run:
    """The call, made once."""
    results: list[Tensor] = []
    start = time.perf_counter()
    grown = growth(lambda: results.append(call()))
    return Run(results[0], time.perf_counter() - start, grown)


def main() -> None:
    """Read the clip, run both halves both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clip")
    parser.add_argument("--frames", type=int, default=33, help="4n + 1")
    parser.add_argument("--size", type=int, default=256, help="height and width, a multiple of 8")
    parser.add_argument("--budget", type=read_bytes, default="3GiB")
    options = parser.parse_args()

    frames, _ = read_video(options.clip, max_frames=options.frames)
    size = {"to_height": options.size, "to_width": options.size}
    frames = apply_fit(frames, fit(*frames.shape[1:3], **size, multiple=8))
    video = (frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).contiguous()
    vae = with_random_weights(HunyuanVideoVAE())
    table = Table(title=f"{' x '.join(map(str, video.shape))} within {show_bytes(options.budget)}")
    for word in ("", "planned", "grown", "s", "grown, no budget", "s", "apart"):
        table.add_column(word, justify="right" if word else "left")
    z = None
    for half, plan, call in (
        ("encode", plan_encode, lambda x, budget: vae.encode(x, budget).mean),
        ("decode", plan_decode, vae.decode),
    ):
        x = video if z is None else z
        planned = plan(vae.config, x.shape, torch.float32, options.budget)
        print(planned.summary(), flush=True)
        with torch.no_grad():
            within, whole = (
                measured(lambda budget=budget, x=x, call=call: call(x, budget))
                for budget in (options.budget, None)
            )
        z = whole.result
        table.add_row(
            half,
            show_bytes(planned.peak),
            _shown(within.grown),
            f"{within.seconds:.0f}",
            _shown(whole.grown),
            f"{whole.seconds:.0f}",
            f"{(within.result - whole.result).abs().max().item():.1e}",
        )
    Console().print(table)


def _shown(grown: int | None) -> str:
    return "unknown" if grown is None else show_bytes(grown)


if __name__ == "__main__":
    main()
