"""How much the resident memory of a process grows while it encodes or decodes within a budget.

    python -m tests.models.vae_resident real decode 1,16,5,16,16 300MiB 1GiB

prints for each budget the planned peak and the measured one, in bytes. The weights are random; a
budget may also be "least". Run it with OMP_NUM_THREADS=1: every thread has a heap of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kit.resident import growth
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.budget import read_bytes
from hunyuan_fast.models.vae.plan import least_budget, plan_decode, plan_encode

SIZES: dict[str, dict[str, Any]] = {
    "real": {},
    "small": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
}


def measure(
    sizes: str, half: str, shape: tuple[int, ...], budgets: list[str]
) -> Iterator[tuple[int, int]]:
    """The planned peak, and bytes by which the resident size grew; none where it is not told."""
    vae = HunyuanVideoVAE(**SIZES[sizes]).requires_grad_(False)
    config, decodes = vae.config, half == "decode"
    call = vae.decode if decodes else vae.encode
    # the first call in a process also loads libraries
    call(torch.zeros((1, shape[1], 2, 2, 2) if decodes else (1, shape[1], 5, 16, 16)), "100GiB")
    x = torch.rand(shape) * 2 - 1
    for words in budgets:
        if words == "least":
            budget = least_budget("decode" if decodes else "encode", config, shape, torch.float32)
        else:
            budget = read_bytes(words)
        planned = plan_decode if decodes else plan_encode
        plan = planned(config, shape, torch.float32, budget)
        print(plan, file=sys.stderr)
        grown = growth(lambda budget=budget: call(x, budget))
        if grown is not None:
            yield plan.peak, grown


if __name__ == "__main__":
    sizes, half, shape, *budgets = sys.argv[1:]
    for peak, grown in measure(sizes, half, tuple(map(int, shape.split(","))), budgets):
        print(peak, grown)
