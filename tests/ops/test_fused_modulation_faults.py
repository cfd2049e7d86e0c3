"""A test of the tests: each planted fault of the gate half must be caught, the right one pass.

Faults of the norm alone are planted in ``tests/test_kit_catches_faults.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.ops.fused_modulation_cases import BOTH, Call, assert_right, draw_call

SEEDS = range(3)


def _choose(vectors: Tensor, index: Tensor) -> Tensor:
    return vectors.float()[torch.arange(len(vectors))[:, None], index]


def _over_tokens(rows: Tensor, index: Tensor, num_vectors: int) -> Tensor:
    sums = [torch.where((index == m)[..., None], rows, 0).sum(1) for m in range(num_vectors)]
    return torch.stack(sums, 1)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Both halves, forward and backward, as a kernel computes them, every step replaceable."""

    gated: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, gate, y: x + gate * y
    round: Callable[[Tensor, torch.dtype], Tensor] = lambda t, dtype: t.to(dtype)
    normed_row: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, unrounded, rounded: rounded
    choose: Callable[[Tensor, Tensor], Tensor] = _choose
    total: Callable[[Tensor, Tensor], Tensor] = lambda through, direct: through + direct
    of_gate: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda total, direct, through: total
    dy: Callable[[Tensor, Tensor], Tensor] = lambda gate, total: gate * total
    branch: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y
    over_tokens: Callable[[Tensor, Tensor, int], Tensor] = _over_tokens

    def __call__(self, call: Call) -> dict[str, Tensor]:
        x, y, gate, shift, scale = call.tensors.values()
        dresidual, dmodulated = (t.float() for t in call.gradients.values())
        assert call.index is not None
        dtype, num_vectors = x.dtype, gate.shape[1]
        gates, shifts, scales = (self.choose(v, call.index) for v in (gate, shift, scale))

        unrounded = self.gated(x.float(), gates, y.float())
        residual = self.round(unrounded, dtype)
        row = self.normed_row(x.float(), unrounded, residual.float())
        centred = row - row.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + call.eps)
        normed = centred * rstd
        modulated = self.round(normed * (1 + scales) + shifts, dtype)

        g = dmodulated * (1 + scales)
        projected = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
        through = projected * rstd
        total = self.total(through, dresidual)
        d = self.of_gate(total, dresidual, through)
        rows = {
            "dgate": d * self.branch(y.float(), x.float()),
            "dshift": dmodulated,
            "dscale": dmodulated * normed,
        }
        sums = {n: self.over_tokens(t, call.index, num_vectors) for n, t in rows.items()}
        return {
            "residual": residual,
            "modulated": modulated,
            "dx": self.round(total, dtype),
            "dy": self.round(self.dy(gates, d), y.dtype),
            **{name: self.round(t, gate.dtype) for name, t in sums.items()},
        }


def _bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def _cut_off(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _without_last_token(rows: Tensor, index: Tensor, num_vectors: int) -> Tensor:
    return _over_tokens(rows[:, :-1], index[:, :-1], num_vectors)


def _last_run_only(rows: Tensor, index: Tensor, num_vectors: int) -> Tensor:
    """A run of tokens of one vector replaces the sums of earlier runs instead of joining them."""
    sums = torch.zeros(len(rows), num_vectors, rows.shape[-1])
    for b, of_sample in enumerate(index.tolist()):
        for l, m in enumerate(of_sample):
            if l and of_sample[l - 1] == m:
                sums[b, m] += rows[b, l]
            else:
                sums[b, m] = rows[b, l]
    return sums


def _added_in_bf16(rows: Tensor, index: Tensor, num_vectors: int) -> Tensor:
    sums = torch.zeros(len(rows), num_vectors, rows.shape[-1], dtype=torch.bfloat16)
    for l in range(rows.shape[1]):
        sums[torch.arange(len(rows)), index[:, l]] += rows[:, l].bfloat16()
    return sums.float()


FAULTS = {
    "1 + gate": Kernel(gated=lambda x, gate, y: x + (1 + gate) * y),
    "gate y rounded before the sum": Kernel(gated=lambda x, gate, y: x + _bf16(gate * y)),
    "y added without its gate": Kernel(gated=lambda x, gate, y: x + y),
    "cut off instead of rounded": Kernel(round=_cut_off),
    "norm of the sum before its rounding": Kernel(
        normed_row=lambda x, unrounded, rounded: unrounded
    ),
    "norm of x": Kernel(normed_row=lambda x, unrounded, rounded: x),
    "vectors of the next sample": Kernel(choose=lambda v, index: _choose(v.roll(1, 0), index)),
    "index not looked at": Kernel(choose=lambda v, index: _choose(v, torch.zeros_like(index))),
    "index of the token before": Kernel(choose=lambda v, index: _choose(v, index.roll(1, 1))),
    "index of the first sample": Kernel(
        choose=lambda v, index: _choose(v, index[:1].expand_as(index))
    ),
    "dx without the gradient of the residual": Kernel(total=lambda through, direct: through),
    "dx without the gradient of the norm": Kernel(total=lambda through, direct: direct),
    "dx with the gradient of the residual twice": Kernel(
        total=lambda through, direct: through + 2 * direct
    ),
    "dgate and dy past the norm": Kernel(of_gate=lambda total, direct, through: direct),
    "dgate and dy without the residual": Kernel(of_gate=lambda total, direct, through: through),
    "dy without its gate": Kernel(dy=lambda gate, total: total),
    "dgate from x": Kernel(branch=lambda y, x: x),
    "sums over all vectors": Kernel(
        over_tokens=lambda rows, index, m: rows.sum(1, keepdim=True).expand(-1, m, -1)
    ),
    "last token not summed": Kernel(over_tokens=_without_last_token),
    "a second run forgets the first": Kernel(over_tokens=_last_run_only),
    "sums in bf16": Kernel(over_tokens=_added_in_bf16),
}


def draw_one(seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return draw_call(BOTH, (2, 48, 256), generator, torch.bfloat16, num_vectors=2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_on_every_seed(fault):
    for seed in SEEDS:
        call = draw_one(seed)
        with pytest.raises(AssertionError):
            assert_right(FAULTS[fault](call), call)


def test_a_right_kernel_raises_no_alarm():
    def in_halves(rows: Tensor, index: Tensor, num_vectors: int) -> Tensor:
        parts = zip(rows.split(20, 1), index.split(20, 1), strict=True)
        return sum((_over_tokens(r, i, num_vectors) for r, i in parts), torch.zeros(()))

    for seed in range(20):
        call = draw_one(seed)
        assert_right(Kernel()(call), call)
        assert_right(Kernel(over_tokens=in_halves)(call), call)
