"""Deliberately wrong kernels, each with one realistic mistake, to test the tests with."""

import torch
from torch import Tensor

from tests.kit.emulation import FlashAttention, LayerNormModulate


def _truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to bf16 by dropping the lower half."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _through(dtype: torch.dtype):
    return lambda x, *_: x.to(dtype).float()


def _sum_in_bf16(x: Tensor) -> Tensor:
    total = torch.zeros(*x.shape[:-1], 1, dtype=torch.bfloat16)
    for part in x.split(64, -1):
        total = total + part.sum(-1, keepdim=True).bfloat16()
    return total.float() / x.shape[-1]


def _padding_lanes_counted(x: Tensor, mean: Tensor) -> Tensor:
    """Lanes past the last feature hold 0, and enter the sum of squares as (0 - mean)^2."""
    lanes = 1 << (x.shape[-1] - 1).bit_length()
    padding = (lanes - x.shape[-1]) * mean.square()
    return ((x - mean).square().sum(-1, keepdim=True) + padding) / x.shape[-1]


def _set(index: tuple, change) -> object:
    """A write step that spoils the elements at ``index``."""

    def write(y: Tensor) -> Tensor:
        y[index] = change(y)
        return y

    return write


def _only_tile(index: int, change):
    return lambda x, tile: change(x) if tile == index else x


def _skip_tile_for_first_queries(weights: Tensor) -> Tensor:
    spoiled = weights.clone()
    spoiled[:, :64] = 0
    return spoiled


LAYER_NORM = {
    "variance divides by E - 1": LayerNormModulate(variance=lambda x, _: x.var(-1, keepdim=True)),
    "eps is 1e-5": LayerNormModulate(eps=lambda _: 1e-5),
    "eps is missing": LayerNormModulate(eps=lambda _: 0.0),
    "padding lanes enter the variance": LayerNormModulate(variance=_padding_lanes_counted),
    "variance as E[x^2] - E[x]^2": LayerNormModulate(
        variance=lambda x, mean: x.square().mean(-1, keepdim=True) - mean.square()
    ),
    "mean rounded to bf16": LayerNormModulate(
        mean=lambda x: x.mean(-1, keepdim=True).bfloat16().float()
    ),
    "sum accumulated in bf16": LayerNormModulate(mean=_sum_in_bf16),
    "scale without 1 +": LayerNormModulate(gain=lambda scale: scale),
    "rsqrt off by 1e-3": LayerNormModulate(rsqrt=lambda x: torch.rsqrt(x) * 1.001),
    "cut off instead of rounded": LayerNormModulate(round=_truncate),
    "last feature not written": LayerNormModulate(write=_set((..., -1), lambda y: 0.0)),
    "one element doubled": LayerNormModulate(write=_set((-1, -1, 77), lambda y: 2 * y[-1, -1, 77])),
    "vectors of the next sample": LayerNormModulate(per_sample=lambda v: v.roll(1, 0)),
    "last row copied from the one before": LayerNormModulate(
        write=_set((slice(None), -1), lambda y: y[:, -2])
    ),
}

ATTENTION = {
    "one padded key leaks": FlashAttention(num_keys=lambda n: n + 1),
    "last valid key dropped": FlashAttention(num_keys=lambda n: n - 1),
    "padded queries answered": FlashAttention(num_queries=lambda n, full: full),
    "scale 1/sqrt(D + 1)": FlashAttention(
        query=lambda q, scale: (q, scale * (q.shape[-1] / (q.shape[-1] + 1)) ** 0.5)
    ),
    "scale folded into bf16 q": FlashAttention(
        query=lambda q, scale: ((q.float() * scale).to(q.dtype), 1.0)
    ),
    "exp off by 2e-3": FlashAttention(
        exp=lambda x: torch.exp(x) * (1 + 2e-3 * torch.sign(torch.sin(1e3 * x)))
    ),
    "probabilities in fp8": FlashAttention(
        round_probabilities=lambda p, _: p.to(torch.float8_e4m3fn).float()
    ),
    "rescale skipped once": FlashAttention(correction=_only_tile(1, torch.ones_like)),
    "a tile skipped for some queries": FlashAttention(
        tile=_only_tile(2, _skip_tile_for_first_queries)
    ),
    "accumulator in bf16": FlashAttention(accumulator=_through(torch.bfloat16)),
    "a query row stale": FlashAttention(write=_set((0, 77, 0), lambda y: y[0, 76, 0])),
    "heads swapped": FlashAttention(write=lambda y: y.flip(2)),
    "cut off instead of rounded": FlashAttention(round=_truncate),
    "samples swapped": FlashAttention(write=lambda y: y.flip(0)),
    "log-sum-exp in base 2": FlashAttention(log=torch.log2),
    # Harmless in the output, where the same roundings cancel, but not in the log-sum-exp.
    "row sums of rounded probabilities": FlashAttention(
        row_sum=lambda p, dtype: p.to(dtype).float().sum(-1, keepdim=True)
    ),
}

ATTENTION_BACKWARD = {
    "delta dropped": FlashAttention(delta=lambda dout, out: torch.zeros_like(dout[..., :1])),
    "delta from dout alone": FlashAttention(delta=lambda dout, out: dout.sum(-1, keepdim=True)),
    "dq not scaled": FlashAttention(dquery=lambda dq, scale: dq),
    "dk not scaled": FlashAttention(dkey=lambda dk, scale: dk),
    "scores not differentiated through the softmax": FlashAttention(
        dscores=lambda p, dp, delta: dp - delta
    ),
    "padded queries reach dk and dv": FlashAttention(num_queries=lambda n, full: min(n + 1, full)),
    "last key gets no gradient": FlashAttention(num_keys=lambda n: n - 1),
    "gradients of the scores in fp8": FlashAttention(
        round_probabilities=lambda p, _: p.to(torch.float8_e4m3fn).float()
    ),
    "cut off instead of rounded": FlashAttention(round=_truncate),
    "exp off by 2e-3": FlashAttention(
        exp=lambda x: torch.exp(x) * (1 + 2e-3 * torch.sign(torch.sin(1e3 * x)))
    ),
}
