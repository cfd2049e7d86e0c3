"""A memory budget that allows the plain pass: its bits, within the planned memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hunyuan_fast import dispatch
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.cost import SLACK
from hunyuan_fast.models.vae.planner import plan_decode, plan_encode
from hunyuan_fast.models.vae.workspace import KEPT
from tests.models.vae_cases import clip, tiny_vae
from tests.models.vae_memory import LiveBytes

PLENTY = 1 << 40
PLANS = {"encode": plan_encode, "decode": plan_decode}


def sample(half: str, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Tensor:
    """A clip, or its latents, of odd sizes."""
    if half == "encode":
        return clip(generator, batch, 3, 5, 24, 40).to(dtype)
    return torch.randn(batch, 4, 2, 3, 5, generator=generator).to(dtype)


def bits(vae: HunyuanVideoVAE, half: str, x: Tensor, *budget: int) -> tuple[Tensor, ...]:
    """Pixels, or mean and log variance."""
    found = getattr(vae, half)(x, *budget)
    return (found,) if half == "decode" else (found.mean, found.logvar)


@pytest.mark.parametrize("half", PLANS)
@pytest.mark.parametrize(
    ("answers", "weights", "maps"),
    [
        ("cpu_impl", torch.float32, torch.float32),
        ("library_impl", torch.bfloat16, torch.bfloat16),
        ("library_impl", torch.float32, torch.bfloat16),
        ("reference", torch.float64, torch.float64),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_plain_pass_keeps_to_its_plan(
    generator: torch.Generator, half: str, answers: str, weights: torch.dtype, maps: torch.dtype
) -> None:
    if answers not in dispatch.implementations("causal_conv3d"):
        pytest.skip("the C++ kernel is not there")
    vae = tiny_vae(generator).to(weights)
    x = sample(half, generator, 2, weights)
    autocast = nullcontext() if maps == weights else torch.autocast("cpu", maps)
    with autocast, dispatch.use(answers, "causal_conv3d"):
        plan = PLANS[half](vae.config, x.shape, maps, PLENTY)
        wanted = {2: bits(vae, half, x)}
        wanted[1] = tuple(map(torch.cat, zip(*(bits(vae, half, c[None]) for c in x), strict=True)))
        # of one small clip the library stacks all taps, which takes more than two clips do
        for together in (2,) if answers == "library_impl" else (2, 1):
            budget = plan.peak - (2 - together)
            planned = PLANS[half](vae.config, x.shape, maps, budget)
            assert planned.together == together
            with LiveBytes() as used:
                found = bits(vae, half, x, budget)
            assert all(map(torch.equal, found, wanted[together]))
            own = answers == "cpu_impl"
            most = planned.peak - SLACK - (0 if own else KEPT)
            assert used.peak <= most
            # what others copy is told too generously
            assert not own or used.peak > 0.7 * most


@pytest.mark.parametrize("half", PLANS)
@torch.no_grad()
def test_progress(generator: torch.Generator, half: str) -> None:
    vae = tiny_vae(generator)
    x = sample(half, generator, 2, torch.float32)
    plan = PLANS[half](vae.config, x.shape, torch.float32, PLENTY)
    for budget in (plan.peak, plan.peak - 1):
        seen: list[float] = []
        getattr(vae, half)(x, budget, progress=seen.append)
        assert seen == sorted(seen) and 0 < seen[0] < 0.8 and seen[-1] == 1
        assert len(seen) > 6


@torch.no_grad()
def test_progress_can_stop_it(generator: torch.Generator) -> None:
    vae = tiny_vae(generator)

    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.decode(sample("decode", generator, 1, torch.float32), PLENTY, progress=stop)
