"""The VAE by one process and by several on this machine's CPU: time, memory, bytes sent.

    python -m benchmarks.vae_ranks real decode 9 128 128 --ranks 1 2

Frames, height and width of the clip; random weights, fp32, gloo between processes, which share the
cores of the machine. Each process is started anew, calls once at a small size, and is then measured
once: the time of the slowest one, by how much the resident memory of each grew at most, the bytes
that each sent by kind, and the largest difference from what the first number of ranks gave.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.bench_vae import _NANO, _REAL, with_random_weights
from benchmarks.kit.resident import growth
from hunyuan_fast.distributed.traffic import count_traffic
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.budget import show_bytes
from hunyuan_fast.models.vae.config import VAEConfig

CONFIGS = {"real": _REAL, "nano": _NANO}


def measured_rank(
    rank: int, world: int, folder: str, config: VAEConfig, half: str, size: tuple[int, ...]
) -> None:
    """What one process does; it leaves what it found in the folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    store = dist.FileStore(f"{folder}/store-{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    with torch.device("meta"):
        vae = HunyuanVideoVAE(**vars(config))
    vae = with_random_weights(vae.to_empty(device="cpu"))
    with torch.no_grad():
        # the first call in a process also loads libraries
        call(vae, half, input_of(config, half, (5, 32, 32)))
        x = input_of(config, half, size)
        results: list[Tensor] = []
        dist.barrier()
        start = time.perf_counter()
        with count_traffic() as traffic:
            grown = growth(lambda: results.append(call(vae, half, x)))
        seconds = time.perf_counter() - start
    found = {"seconds": seconds, "grown": grown, "sent": dict(traffic.bytes)}
    if rank == 0:
        found["result"] = results[0]
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def input_of(config: VAEConfig, half: str, size: tuple[int, ...]) -> Tensor:
    """Noise: a clip of this size, or its latents."""
    generator = torch.Generator().manual_seed(1)
    frames, height, width = size
    if half == "encode":
        return 2 * torch.rand(1, config.in_channels, *size, generator=generator) - 1
    latent = (frames - 1) // 4 + 1, height // 8, width // 8
    return torch.randn(1, config.latent_channels, *latent, generator=generator)


def call(vae: HunyuanVideoVAE, half: str, x: Tensor) -> Tensor:
    """Pixels, or the means of latents, by all processes."""
    group = dist.group.WORLD
    return vae.decode(x, group=group) if half == "decode" else vae.encode(x, group=group).mean


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sizes", choices=sorted(CONFIGS))
    parser.add_argument("half", choices=["encode", "decode"])
    parser.add_argument("frames", type=int, help="4n + 1")
    parser.add_argument("height", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    size = options.frames, options.height, options.width
    table = Table(title=f"{options.sizes}, {options.half} {' x '.join(map(str, size))}")
    for word in ("ranks", "s", "grown by, each", "sent by each: halos", "the rest", "apart"):
        table.add_column(word, justify="right")
    first: Tensor | None = None
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, folder, CONFIGS[options.sizes], options.half, size)
            mp.start_processes(measured_rank, arguments, world, start_method="spawn")
            found = [torch.load(Path(folder) / f"{world}-{n}.pt") for n in range(world)]
        first = found[0]["result"] if first is None else first
        apart = (found[0]["result"] - first).abs().max().item()
        table.add_row(str(world), *row_of(found), f"{apart:.1e}")
    Console().print(table)


def row_of(found: list[dict[str, Any]]) -> list[str]:
    """Of the slowest and of each."""
    grown = [rank["grown"] for rank in found]
    halos = [rank["sent"].get("halo", 0) for rank in found]
    rest = [sum(rank["sent"].values()) - n for rank, n in zip(found, halos, strict=True)]
    return [
        f"{max(rank['seconds'] for rank in found):.2f}",
        ", ".join("unknown" if n is None else show_bytes(n) for n in grown),
        ", ".join(map(show_bytes, halos)),
        ", ".join(map(show_bytes, rest)),
    ]


if __name__ == "__main__":
    main()
