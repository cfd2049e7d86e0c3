"""A test of the tests: wrong group norms must be caught, right ones raise no alarm."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.kit.inputs import FAMILIES
from tests.kit.numerics import assert_as_good_as, assert_rounded_once
from tests.ops.group_norm_silu_cases import NAMES, Call, draw_call, plain

SEEDS = range(4)
SHAPE, GROUPS = (2, 64, 3, 6, 7), 16
Parts = list[tuple[Tensor, Tensor, Tensor]]  # count, mean, squares of each


def _same(x):
    return x


def _population(values: Tensor, mean: Tensor) -> Tensor:
    return (values - mean).square().sum(-1, keepdim=True)


def _merge(parts: Parts) -> tuple[Tensor, Tensor]:
    """Mean and variance of all parts together."""
    count = sum(n for n, _, _ in parts)
    mean = sum(n * m for n, m, _ in parts) / count
    squares = sum(s + n * (m - mean).square() for n, m, s in parts)
    return mean, squares / count


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _set(index: tuple, change: Callable[[Tensor], Tensor | float]):
    def write(y: Tensor) -> Tensor:
        y[index] = change(y)
        return y

    return write


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """Both directions as a kernel rounds them, every step replaceable; the defaults are right."""

    groups: Callable[[int], int] = _same
    squares: Callable[[Tensor, Tensor], Tensor] = _population
    parts: Callable[[Parts], Parts] = _same
    merge: Callable[[Parts], tuple[Tensor, Tensor]] = _merge
    of_frames: bool = False
    eps: Callable[[float], float] = _same
    rsqrt: Callable[[Tensor], Tensor] = torch.rsqrt
    normed: Callable[[Tensor, torch.dtype], Tensor] = lambda n, _: n
    vectors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda w, b: (w, b)
    silu: Callable[[Tensor], Tensor] = lambda z: z * torch.sigmoid(z)
    round: Callable[[Tensor, torch.dtype], Tensor] = _round
    write: Callable[[Tensor], Tensor] = _same
    # backward
    slope: Callable[[Tensor], Tensor] = lambda z: (
        torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z)))
    )
    level: Callable[[Tensor], Tensor] = _same
    along: Callable[[Tensor], Tensor] = _same
    share: Callable[[Tensor], Tensor] = _same

    def _normalise(self, call: Call) -> tuple[Tensor, Tensor]:
        """n and rstd, both like x."""
        x = call.x.float().contiguous()
        groups = self.groups(call.groups)
        frames = []
        for frame in x.unbind(2):
            values = frame.reshape(len(x), groups, -1)
            mean = values.mean(-1, keepdim=True)
            count = torch.full_like(mean, values.shape[-1])
            frames.append((count, mean, self.squares(values, mean)))
        frames = self.parts(frames)
        chosen = [[part] for part in frames] if self.of_frames else [frames] * x.shape[2]
        results = []
        for frame, parts in zip(x.unbind(2), chosen, strict=True):
            mean, variance = self.merge(parts)
            rstd = self.rsqrt(variance + self.eps(call.eps))
            values = frame.reshape(len(x), groups, -1)
            normed = ((values - mean) * rstd).reshape(frame.shape)
            results.append((normed, rstd.expand_as(values).reshape(frame.shape)))
        normed, rstd = (torch.stack(each, 2) for each in zip(*results, strict=True))
        return self.normed(normed, call.x.dtype), rstd

    def _affine(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normed, rstd = self._normalise(call)
        weight, bias = self.vectors(call.weight.float(), call.bias.float())
        weight, bias = (v[:, None, None, None] for v in (weight, bias))
        return normed, rstd, weight, normed * weight + bias

    def forward(self, call: Call) -> list[Tensor]:
        *_, z = self._affine(call)
        return [self.write(self.round(self.silu(z), call.x.dtype))]

    def backward(self, call: Call) -> list[Tensor]:
        normed, rstd, weight, z = self._affine(call)
        dz = call.dy.float() * self.slope(z)
        g = dz * weight

        def mean(t: Tensor) -> Tensor:
            values = t.reshape(len(t), call.groups, -1)
            return values.mean(-1, keepdim=True).expand_as(values).reshape(t.shape)

        dx = rstd * (g - self.level(mean(g)) - normed * self.along(mean(g * normed)))
        dweight, dbias = (self.share(t).sum((0, 2, 3, 4)) for t in (dz * normed, dz))
        dx = self.write(self.round(dx, call.x.dtype))
        return [dx, dweight.to(call.weight.dtype), dbias.to(call.bias.dtype)]


STATISTICS = {
    "variance as E[x^2] - E[x]^2": GroupNorm(
        squares=lambda v, m: v.square().sum(-1, keepdim=True) - v.shape[-1] * m.square()
    ),
    "unbiased variance": GroupNorm(
        merge=lambda parts: (
            _merge(parts)[0],
            _merge(parts)[1] * (n := sum(p[0] for p in parts)) / (n - 1),
        )
    ),
    "merge without the part between": GroupNorm(
        merge=lambda parts: (_merge(parts)[0], sum(p[2] for p in parts) / sum(p[0] for p in parts))
    ),
    "last part left out": GroupNorm(parts=lambda parts: parts[:-1]),
    "a part counted twice": GroupNorm(parts=lambda parts: [*parts, parts[0]]),
    "statistics of each frame": GroupNorm(of_frames=True),
    "statistics of the next sample": GroupNorm(
        parts=lambda parts: [tuple(t.roll(1, 0) for t in p) for p in parts]
    ),
    "half as many groups": GroupNorm(groups=lambda g: g // 2),
    "eps forgotten": GroupNorm(eps=lambda _: 0.0),
    "eps is 1e-5": GroupNorm(eps=lambda _: 1e-5),
    "rsqrt off by 1e-3": GroupNorm(rsqrt=lambda v: torch.rsqrt(v) * 1.001),
}
FORWARD = STATISTICS | {
    "rounded before the weight": GroupNorm(normed=lambda n, dtype: n.to(dtype).float()),
    "rounded before silu": GroupNorm(
        silu=lambda z: z.bfloat16().float() * torch.sigmoid(z.bfloat16().float())
    ),
    "weight and bias exchanged": GroupNorm(vectors=lambda w, b: (b, w)),
    "weight of the next channel": GroupNorm(vectors=lambda w, b: (w.roll(1), b)),
    "silu left out": GroupNorm(silu=lambda z: z),
    "gelu in place of silu": GroupNorm(silu=torch.nn.functional.gelu),
    "silu off by 1e-3": GroupNorm(silu=lambda z: z * torch.sigmoid(z) * 1.001),
    "cut off instead of rounded": GroupNorm(round=_truncate),
    "last channel not written": GroupNorm(write=_set((slice(None), -1), lambda y: 0.0)),
    "one value doubled": GroupNorm(write=_set((1, 5, 2, 3, 4), lambda y: 2 * y[1, 5, 2, 3, 4])),
    "a frame stale": GroupNorm(write=_set((1, slice(None), 2), lambda y: y[1, :, 1])),
}
BACKWARD = {
    "the part along n is left in": GroupNorm(along=torch.zeros_like),
    "the mean is left in": GroupNorm(level=torch.zeros_like),
    "the part along n taken twice": GroupNorm(along=lambda m: 2 * m),
    "silu's gradient is the logistic function": GroupNorm(slope=torch.sigmoid),
    "silu's gradient without z": GroupNorm(slope=lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
    "silu's gradient left out": GroupNorm(slope=torch.ones_like),
    "a frame left out of the sums": GroupNorm(share=lambda t: t[:, :, 1:]),
    "sums of one sample": GroupNorm(share=lambda t: t[:1]),
    "a row counted twice": GroupNorm(share=lambda t: torch.cat((t, t[:, :, :, :1]), dim=3)),
    "merge without the part between": STATISTICS["merge without the part between"],
    "statistics of each frame": STATISTICS["statistics of each frame"],
    "rsqrt off by 1e-3": STATISTICS["rsqrt off by 1e-3"],
    "cut off instead of rounded": GroupNorm(round=_truncate),
    "last channel not written": GroupNorm(write=_set((slice(None), -1), lambda y: 0.0)),
}


@cache
def case(family: str, seed: int) -> tuple[Call, dict[torch.dtype, list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    call = draw_call(generator, SHAPE, GROUPS, dtype=torch.bfloat16, family=family)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return call, {dtype: plain(call, dtype) for dtype in dtypes}


def judge_forward(kernel: GroupNorm, family: str, seed: int) -> None:
    call, truths = case(family, seed)
    (y,) = kernel.forward(call)
    assert_rounded_once(y, truths[torch.float64][0], truths[torch.float32][0])


def judge_backward(kernel: GroupNorm, family: str, seed: int) -> None:
    call, truths = case(family, seed)
    for index, actual in enumerate(kernel.backward(call), 1):
        exact, single, same = (truth[index] for truth in truths.values())
        assert_as_good_as(actual, exact, same, name=NAMES[index])
        if actual.dim() > 1:
            assert_rounded_once(actual, exact, single, name=NAMES[index])


def missed(judge: Callable[[GroupNorm, str, int], None], kernel: GroupNorm) -> list[int]:
    """The seeds at which no family of inputs shows that the kernel is wrong."""

    def caught(family: str, seed: int) -> bool:
        try:
            judge(kernel, family, seed)
        except AssertionError:
            return True
        return False

    return [seed for seed in SEEDS if not any(caught(family, seed) for family in FAMILIES)]


@pytest.mark.parametrize("fault", FORWARD)
def test_forward_faults_are_caught(fault):
    assert not missed(judge_forward, FORWARD[fault])


@pytest.mark.parametrize("fault", BACKWARD)
def test_backward_faults_are_caught(fault):
    assert not missed(judge_backward, BACKWARD[fault])


def test_right_kernels_raise_no_alarm():
    kernels = (GroupNorm(), GroupNorm(rsqrt=lambda v: 1 / torch.sqrt(v), silu=torch.nn.SiLU()))
    for seed in SEEDS:
        for family in FAMILIES:
            for kernel in kernels:
                judge_forward(kernel, family, seed)
                judge_backward(kernel, family, seed)
