"""A test of the tests: wrong ways to make joint heads must be caught, right ones raise no alarm."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.kit.inputs import FAMILIES
from tests.kit.numerics import assert_as_good_as, assert_equal, assert_rounded_once
from tests.ops.qk_norm_rope_cases import Call, draw_call, plain

SEEDS = range(8)


def _same(x):
    return x


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _set(index: tuple, change: Callable[[Tensor], Tensor | float]):
    """A write step that spoils the elements at ``index``."""

    def write(y: Tensor) -> Tensor:
        y[index] = change(y)
        return y

    return write


@dataclass(frozen=True, kw_only=True)
class JointHeads:
    """Both directions as a kernel rounds them, every step replaceable; the defaults are right."""

    mean_square: Callable[[Tensor], Tensor] = _mean_square
    eps: Callable[[float], float] = _same
    rsqrt: Callable[[Tensor], Tensor] = torch.rsqrt
    normed: Callable[[Tensor, torch.dtype], Tensor] = lambda x, _: x
    weights: Callable[[list[Tensor]], list[Tensor]] = _same
    video_rows: Callable[[int], int] = _same
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] = _turn
    turn_then_weigh: bool = False
    joined: Callable[[list[Tensor]], list[Tensor]] = _same
    round: Callable[[Tensor, torch.dtype], Tensor] = _round
    write: Callable[[Tensor], Tensor] = _same
    # backward
    turn_back: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda g, cos, sin: _turn(g, cos, -sin)
    along: Callable[[Tensor], Tensor] = _same
    gradient_weights: Callable[[list[Tensor]], list[Tensor]] = _same
    share: Callable[[Tensor], Tensor] = _same
    packed: Callable[[list[Tensor]], list[Tensor]] = _same

    def forward(self, call: Call) -> list[Tensor]:
        """q, k and v of a call of two streams."""
        weights = self.weights([*call.weights, *call.text[1:]])
        streams = [(call.qkv, weights[:2]), (call.text[0], weights[2:])]
        parts = []
        for stream, (packed, pair) in enumerate(streams):
            *xs, v = packed.unflatten(-1, (3, call.num_heads, -1)).unbind(2)
            heads = [self._head(x, w, call, stream) for x, w in zip(xs, pair, strict=True)]
            parts.append([*heads, v])
        joined = self.joined([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
        return [self.write(t.clone()) for t in joined]

    def _head(self, x: Tensor, weight: Tensor, call: Call, stream: int) -> Tensor:
        y = self.normed(self._normalise(x, call.eps)[0], x.dtype)
        if not self.turn_then_weigh:
            y = y * weight.float()
        y = self._first_rows(y, call, stream, self.turn)
        if self.turn_then_weigh:
            y = y * weight.float()
        return self.round(y, x.dtype)

    def _normalise(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = x.float()
        rstd = self.rsqrt(self.mean_square(wide) + self.eps(eps))
        return wide * rstd, rstd

    def _first_rows(self, y: Tensor, call: Call, stream: int, turn: Callable) -> Tensor:
        video = call.qkv.shape[1]
        rows = min(max(self.video_rows(video) - stream * video, 0), y.shape[1])
        cos, sin = (table[stream * video :][:rows, None, 0::2] for table in self._longer(call))
        return torch.cat((turn(y[:, :rows], cos, sin), y[:, rows:]), dim=1)

    @staticmethod
    def _longer(call: Call) -> list[Tensor]:
        """The tables with their last row once more, for who turns a row too many."""
        return [torch.cat((table, table[-1:])) for table in call.tables]

    def backward(self, call: Call) -> list[Tensor]:
        """dqkv, dq_weight, dk_weight, dtext_qkv, dtext_q_weight, dtext_k_weight."""
        video = call.qkv.shape[1]
        weights = self.gradient_weights([*call.weights, *call.text[1:]])
        streams = [(call.qkv, weights[:2]), (call.text[0], weights[2:])]
        results = []
        for stream, (packed, pair) in enumerate(streams):
            rows = slice(video) if stream == 0 else slice(video, None)
            *xs, _ = packed.unflatten(-1, (3, call.num_heads, -1)).unbind(2)
            *gs, dv = (g[:, rows] for g in call.gradients)
            parts, sums = [], []
            for x, g, weight in zip(xs, gs, pair, strict=True):
                normed, rstd = self._normalise(x, call.eps)
                u = self._first_rows(g.float(), call, stream, self.turn_back)
                along = self.along((u * weight.float() * normed).mean(-1, keepdim=True))
                dx = (u * weight.float() - normed * along) * rstd
                parts.append(self.round(dx, x.dtype))
                sums.append(self.share(u * normed).sum((0, 1, 2)).to(weight.dtype))
            dpacked = torch.stack(self.packed([*parts, dv]), dim=2).flatten(2)
            results += [self.write(dpacked), *sums]
        return results


FORWARD = {
    "mean square divides by D - 1": JointHeads(
        mean_square=lambda x: x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    ),
    "mean taken away": JointHeads(mean_square=lambda x: x.var(-1, keepdim=True, correction=0)),
    "statistics over all heads": JointHeads(
        mean_square=lambda x: x.square().mean((-2, -1), keepdim=True)
    ),
    "eps is 1e-5": JointHeads(eps=lambda _: 1e-5),
    "eps is missing": JointHeads(eps=lambda _: 0.0),
    "rsqrt off by 1e-3": JointHeads(rsqrt=lambda x: torch.rsqrt(x) * 1.001),
    "rounded before the weight": JointHeads(normed=lambda x, dtype: x.to(dtype).float()),
    "weights of q and k exchanged": JointHeads(weights=lambda w: [w[1], w[0], w[3], w[2]]),
    "text takes the weights of video": JointHeads(weights=lambda w: w[:2] * 2),
    "turned the other way": JointHeads(turn=lambda x, cos, sin: _turn(x, cos, -sin)),
    "pairs from two halves": JointHeads(turn=_turn_halves),
    "angles of the next pair": JointHeads(
        turn=lambda x, cos, sin: _turn(x, cos.roll(1, -1), sin.roll(1, -1))
    ),
    "angles of the row before": JointHeads(
        turn=lambda x, cos, sin: _turn(x, cos.roll(1, 0), sin.roll(1, 0))
    ),
    "turned before the weight": JointHeads(turn_then_weigh=True),
    "last video row not turned": JointHeads(video_rows=lambda n: n - 1),
    "first text row turned": JointHeads(video_rows=lambda n: n + 1),
    "text before video": JointHeads(joined=lambda t: [x.roll(3, 1) for x in t]),
    "q and k exchanged": JointHeads(joined=lambda t: [t[1], t[0], t[2]]),
    "heads exchanged": JointHeads(joined=lambda t: [t[0], t[1].flip(2), t[2]]),
    "samples exchanged": JointHeads(joined=lambda t: [t[0], t[1], t[2].flip(0)]),
    "cut off instead of rounded": JointHeads(round=_truncate),
    "last feature not written": JointHeads(write=_set((..., -1), lambda y: 0.0)),
    "one head stale": JointHeads(write=_set((1, 4, 1), lambda y: y[1, 3, 1])),
}

BACKWARD = {
    "the part along x is left in": JointHeads(along=torch.zeros_like),
    "the part along x taken twice": JointHeads(along=lambda m: 2 * m),
    "turned the same way again": JointHeads(turn_back=_turn),
    "not turned back": JointHeads(turn_back=lambda g, cos, sin: g),
    "last video row not turned back": JointHeads(video_rows=lambda n: n - 1),
    "first text row turned": JointHeads(video_rows=lambda n: n + 1),
    "weight left out": JointHeads(gradient_weights=lambda w: [torch.ones_like(t) for t in w]),
    "text takes the weights of video": JointHeads(gradient_weights=lambda w: w[:2] * 2),
    "a head left out of the sums": JointHeads(share=lambda s: s[:, :, :-1]),
    "a row left out of the sums": JointHeads(share=lambda s: s[:, 1:]),
    "a row counted twice": JointHeads(share=lambda s: torch.cat((s, s[:, -1:]), dim=1)),
    "sums of one sample": JointHeads(share=lambda s: s[:1]),
    "rsqrt off by 1e-3": JointHeads(rsqrt=lambda x: torch.rsqrt(x) * 1.001),
    "cut off instead of rounded": JointHeads(round=_truncate),
    "gradients of q and k exchanged": JointHeads(packed=lambda t: [t[1], t[0], t[2]]),
    "gradient of v not copied": JointHeads(packed=lambda t: [*t[:2], torch.zeros_like(t[2])]),
    "last feature not written": JointHeads(write=_set((..., -1), lambda y: 0.0)),
}


@cache
def case(family: str, seed: int) -> tuple[Call, dict[torch.dtype, list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    call = draw_call(generator, heads=3, dtype=torch.bfloat16, family=family)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return call, {dtype: plain(call, dtype) for dtype in dtypes}


def judge_forward(kernel: JointHeads, family: str, seed: int) -> None:
    call, truths = case(family, seed)
    q, k, v = kernel.forward(call)
    assert_equal(v, truths[torch.bfloat16][2], name="v")
    for index, actual in enumerate((q, k)):
        assert_rounded_once(actual, truths[torch.float64][index], truths[torch.float32][index])


def judge_backward(kernel: JointHeads, family: str, seed: int) -> None:
    call, truths = case(family, seed)
    for index, actual in enumerate(kernel.backward(call), 3):
        exact, single, same = (truth[index] for truth in truths.values())
        assert_as_good_as(actual, exact, same, name=call.names[index])
        if actual.dim() > 1:
            assert_rounded_once(actual, exact, single, name=call.names[index])


def missed(judge: Callable[[JointHeads, str, int], None], kernel: JointHeads) -> list[int]:
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
    right = JointHeads()
    in_parts = replace(
        right,
        mean_square=lambda x: (
            sum(p.square().sum(-1, keepdim=True) for p in x.split(16, -1)) / x.shape[-1]
        ),
        rsqrt=lambda x: 1 / torch.sqrt(x),
    )
    for seed in SEEDS:
        for family in FAMILIES:
            for kernel in (right, in_parts):
                judge_forward(kernel, family, seed)
                judge_backward(kernel, family, seed)
