"""Planted faults: each realistic mistake of a kernel must be seen by the rules that judge them."""

from dataclasses import replace

import pytest
import torch

from tests.kit import faults
from tests.kit.emulation import FlashAttention
from tests.ops.frame_causal_attention_cases import Call, Emulated, draw_call, judge

SEEDS = range(3)


class TokenCausal(Emulated):
    """Every token sees those before it alone, as in a language model."""

    def __call__(self, call: Call) -> list[torch.Tensor]:
        return Emulated.__call__(self, replace(call, tokens=1))


class Swapped(Emulated):
    """The queries stand at the beginning of the clip instead of at its end."""

    def __call__(self, call: Call) -> list[torch.Tensor]:
        queries = call.q.shape[1]
        first = replace(call, k=call.k[:, :queries], v=call.v[:, :queries])
        out, dq, dk, dv = Emulated.__call__(self, first)
        rest = torch.zeros_like(call.k[:, queries:])
        return [out, dq, torch.cat((dk, rest), 1), torch.cat((dv, rest), 1)]


def _of_kernel(name: str, of: str = "ATTENTION") -> Emulated:
    return Emulated(kernel=getattr(faults, of)[name])


FAULTS = {
    "a frame too many": Emulated(seen=lambda visible, tokens: visible + tokens),
    "a frame too few": Emulated(seen=lambda visible, tokens: max(tokens, visible - tokens)),
    "a key too many": Emulated(seen=lambda visible, tokens: visible + 1),
    "a key too few": Emulated(seen=lambda visible, tokens: visible - 1),
    "everything is seen": Emulated(seen=lambda visible, tokens: 10**6),
    "causal by tokens": TokenCausal(),
    "queries at the beginning": Swapped(),
    "scale forgotten": Emulated(kernel=FlashAttention(query=lambda q, scale: (q, 1.0))),
    "scale of another head size": _of_kernel("scale 1/sqrt(D + 1)"),
    "rescale skipped once": _of_kernel("rescale skipped once"),
    "accumulator in bf16": _of_kernel("accumulator in bf16"),
    "cut off instead of rounded": _of_kernel("cut off instead of rounded"),
    "probabilities in fp8": _of_kernel("probabilities in fp8"),
    "the last frame gives keys nothing": Emulated(shares=lambda frame, frames: frame < frames - 1),
    "the first frame gives keys nothing": Emulated(shares=lambda frame, frames: frame > 0),
    "delta dropped": _of_kernel("delta dropped", "ATTENTION_BACKWARD"),
    "dq not scaled": _of_kernel("dq not scaled", "ATTENTION_BACKWARD"),
    "dk not scaled": _of_kernel("dk not scaled", "ATTENTION_BACKWARD"),
    "frames in another order": Emulated(
        frame=lambda rows: slice(66 - rows.stop, 66 - rows.start),
    ),
}


def drawn(seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return draw_call(
        generator, frames=3, tokens=22, past=1, head_dim=64, heads=2, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault):
    for seed in SEEDS:
        call = drawn(seed)
        with pytest.raises(AssertionError, match=r"more than|break the bound"):
            judge(fault, FAULTS[fault](call), call)


def test_right_kernels_raise_no_alarm():
    for seed in SEEDS:
        call = drawn(seed)
        for block in (16, 32, 128):
            kernel = FlashAttention(block=block, exp=lambda x: torch.exp2(x * 1.4426950408889634))
            judge("a right kernel", Emulated(kernel=kernel)(call), call)
