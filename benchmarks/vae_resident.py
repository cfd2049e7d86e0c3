"""How much the resident memory of a process grows while it encodes or decodes within a budget.

    python -m benchmarks.vae_resident real decode 1,16,5,16,16 300MiB 1GiB

prints for each budget the planned peak and the measured one, in bytes. The weights are random; a
budget may also be "least", or "none": then nothing is planned, and 0 printed. Nothing is printed
where the system does not tell the highest resident size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kit.resident import growth
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.budget import read_bytes
from hunyuan_fast.models.vae.planner import least_budget, plan_decode, plan_encode

SIZES: dict[str, dict[str, Any]] = {
    "real": {},
    "small": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
}


def measure(
    sizes: str, half: str, shape: tuple[int, ...], budgets: list[str]
) -> Iterator[tuple[int, int]]:
    """The planned peak, and bytes by which the resident size grew, for each budget."""
    vae = HunyuanVideoVAE(**SIZES[sizes]).requires_grad_(False)
    config, decodes = vae.config, half == "decode"
    call, planned = (vae.decode, plan_decode) if decodes else (vae.encode, plan_encode)
    # the first calls in a process also load libraries
    small = torch.zeros((1, shape[1], 2, 2, 2) if decodes else (1, shape[1], 5, 16, 16))
    for budget in (None, "100GiB"):
        call(small, budget)
    x = torch.rand(shape) * 2 - 1
    for words in budgets:
        budget, peak = None, 0
        if words == "least":
            budget = least_budget("decode" if decodes else "encode", config, shape, torch.float32)
        elif words != "none":
            budget = read_bytes(words)
        if budget is not None:
            plan = planned(config, shape, torch.float32, budget)
            peak = plan.peak
            print(plan, file=sys.stderr)
        grown = growth(partial(call, x, budget))
        if grown is not None:
            yield peak, grown


if __name__ == "__main__":
    sizes, half, shape, *budgets = sys.argv[1:]
    for peak, grown in measure(sizes, half, tuple(map(int, shape.split(","))), budgets):
        print(peak, grown, flush=True)
