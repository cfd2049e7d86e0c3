"""Planted faults: each realistic mistake of a kernel must be seen by the rules that judge them."""

import pytest
import torch
from torch import Tensor

from hunyuan_fast.kernels.fp8_attention.reference import Codes
from tests.kit import faults
from tests.kit.emulation import FlashAttention
from tests.ops.fp8_attention_cases import (
    Call,
    Emulated,
    Scaled,
    butterflies,
    draw_call,
    judge,
    judge_codes,
    statistics,
)

SEEDS = range(3)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _truncated(x: Tensor) -> Tensor:
    """Towards zero."""
    code = x.clamp(-448, 448).to(E4M3).float()
    toward_zero = (code.abs() - x.abs()).clamp_min(0) > 0
    lower = (code.view(torch.int32) - (1 << 20)).view(torch.float32)
    return torch.where(toward_zero & (code.abs() >= 2.0**-6), lower, code)


def _on_keys(change):
    """A change of keys alone: the second of the two that are rotated."""
    calls = iter(range(10**6))
    return lambda x: change(butterflies(x)) if next(calls) % 2 else butterflies(x)


def _kernel(name: str) -> Emulated:
    return Emulated(kernel=faults.ATTENTION[name])


class Unpermuted(Scaled):
    """Values by token, where a kernel reads them by position."""

    def __call__(self, call: Call, known) -> Codes:
        codes = Scaled.__call__(self, call, known)
        tokens = torch.arange(codes.v.shape[-1])
        position = tokens // 16 * 16 + tokens % 8 // 2 * 4 + tokens % 16 // 8 * 2 + tokens % 2
        return codes._replace(v=codes.v[..., position])


class NeighbourScales(Scaled):
    """The scale of the block before."""

    def __call__(self, call: Call, known) -> Codes:
        codes = Scaled.__call__(self, call, known)
        return codes._replace(q_scale=codes.q_scale.roll(1, -1))


class NoMean(Scaled):
    """The mean of the values, which they were centred about, is not added again."""

    def __call__(self, call: Call, known) -> Codes:
        codes = Scaled.__call__(self, call, known)
        return codes._replace(v_mean=torch.zeros_like(codes.v_mean))


class HeadScale(Scaled):
    """One scale of values for all features of a head."""

    def __call__(self, call: Call, known) -> Codes:
        known = known._replace(
            value_peak=known.value_peak.amax(-1, keepdim=True).expand_as(known.value_peak)
        )
        return Scaled.__call__(self, call, known)


FAULTS = {
    "a key too many": Emulated(kernel=FlashAttention(num_keys=lambda n: n + 1)),
    "the last key dropped": _kernel("last valid key dropped"),
    "rescale skipped once": _kernel("rescale skipped once"),
    "a tile skipped for some queries": _kernel("a tile skipped for some queries"),
    "cut off instead of rounded": Emulated(code=_truncated),
    "codes of e5m2": Emulated(code=lambda x: x.to(E5M2).float()),
    "row sums doubled": Emulated(kernel=FlashAttention(row_sum=lambda p, _: 2 * p.sum(-1, True))),
    "values not permuted": Emulated(scaled=Unpermuted()),
    "the scale of another block": Emulated(scaled=NeighbourScales()),
    "the mean of the values lost": Emulated(scaled=NoMean()),
    "queries rotated and keys not": Emulated(scaled=Scaled(rotate=_on_keys(lambda k: 11.3 * k))),
    "nothing rotated": Emulated(scaled=Scaled(rotate=lambda x: x * 128**0.5)),
    "heads swapped": Emulated(write=lambda y: y.flip(2)),
    "a query row stale": _kernel("a query row stale"),
}
# What leaves outputs as good as they were is for the codes to show.
CODE_FAULTS = {
    "cut off instead of rounded": (Scaled(), lambda x: _truncated(x).to(E4M3)),
    "scales of 32 queries": (Scaled(query_block=32), lambda x: x.to(E4M3)),
    "values not permuted": (Unpermuted(), lambda x: x.to(E4M3)),
    "keys not centred": (Scaled(centre_keys=False), lambda x: x.to(E4M3)),
    "one scale for all features of values": (HeadScale(), lambda x: x.to(E4M3)),
    "values not centred": (Scaled(centre_values=False), lambda x: x.to(E4M3)),
    "nothing rotated": (Scaled(rotate=lambda x: x * 128**0.5), lambda x: x.to(E4M3)),
    "a token too few": (Scaled(valid=lambda n: n - 1), lambda x: x.to(E4M3)),
}


def drawn(seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return draw_call(
        generator, length=201, lengths=(201, 150), head_dim=128, outliers=10.0, bias=0.5
    )


def short(seed: int) -> Call:
    """Two and five tokens, where each has its weight."""
    generator = torch.Generator().manual_seed(seed)
    return draw_call(generator, length=9, lengths=(2, 5), bias=0.5)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault):
    for seed in SEEDS:
        assert any(_caught(fault, call) for call in (drawn(seed), short(seed)))


def _caught(fault: str, call: Call) -> bool:
    result = FAULTS[fault](call)
    try:
        judge(fault, result, call)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_faults_of_codes_are_caught(fault):
    scaled, code = CODE_FAULTS[fault]
    for seed in SEEDS:
        call = drawn(seed)
        known = statistics(call)
        codes = scaled(call, known)
        codes = codes._replace(q=code(codes.q), k=code(codes.k), v=code(codes.v))
        with pytest.raises(AssertionError):
            judge_codes(fault, codes, call, known)


def test_right_kernels_raise_no_alarm():
    for call in (draw(seed) for seed in SEEDS for draw in (drawn, short)):
        for block in (32, 128):
            kernel = FlashAttention(block=block)
            for top in (256.0, 448.0):
                judge("a right kernel", Emulated(kernel=kernel, top=top)(call), call)
        known = statistics(call)
        codes = Scaled()(call, known)
        codes = codes._replace(**{x: getattr(codes, x).to(E4M3) for x in "qkv"})
        judge_codes("right codes", codes, call, known)
