"""Kernels as a GPU would round them, in plain torch, every step replaceable.

The defaults are right: they are the yardstick of tier B, and what an implementation may cost in
accuracy. ``tests.kit.faults`` replaces one step at a time by a wrong one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _population_variance(x: Tensor, mean: Tensor) -> Tensor:
    return (x - mean).square().mean(-1, keepdim=True)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _same(x):
    return x


def _first(x, *_):
    return x


@dataclass(frozen=True, kw_only=True)
class LayerNormModulate:
    """Layer norm without weights, then ``* (1 + scale) + shift``: fp32 inside, rounded once."""

    mean: Callable[[Tensor], Tensor] = lambda x: x.mean(-1, keepdim=True)
    variance: Callable[[Tensor, Tensor], Tensor] = _population_variance
    eps: Callable[[float], float] = _same
    rsqrt: Callable[[Tensor], Tensor] = torch.rsqrt
    gain: Callable[[Tensor], Tensor] = lambda scale: 1 + scale
    per_sample: Callable[[Tensor], Tensor] = _same
    round: Callable[[Tensor, torch.dtype], Tensor] = _round
    write: Callable[[Tensor], Tensor] = _same

    def __call__(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
        """x (B, L, E), shift and scale (B, E) -> (B, L, E)."""
        single = x.float()
        shift, scale = (self.per_sample(vector).float()[:, None] for vector in (shift, scale))
        mean = self.mean(single)
        rstd = self.rsqrt(self.variance(single, mean) + self.eps(eps))
        y = (single - mean) * rstd * self.gain(scale) + shift
        return self.write(self.round(y, x.dtype).clone())


@dataclass(frozen=True, kw_only=True)
class FlashAttention:
    """Attention over tiles of keys with a running maximum, as FlashAttention does.

    Scores, sums and accumulators are fp32; probabilities, and their gradients, are rounded to the
    dtype of the inputs before they enter a matrix product.
    """

    block: int = 64
    # Queries between two roundings of dk and dv to the dtype of the inputs; None: fp32 throughout.
    gradient_block: int | None = None
    num_keys: Callable[[int], int] = _same
    num_queries: Callable[[int, int], int] = _first
    query: Callable[[Tensor, float], tuple[Tensor, float]] = lambda q, scale: (q, scale)
    exp: Callable[[Tensor], Tensor] = torch.exp
    round_probabilities: Callable[[Tensor, torch.dtype], Tensor] = _round
    tile: Callable[[Tensor, int], Tensor] = _first
    correction: Callable[[Tensor, int], Tensor] = _first
    accumulator: Callable[[Tensor], Tensor] = _same
    row_sum: Callable[[Tensor, torch.dtype], Tensor] = lambda p, _: p.sum(-1, keepdim=True)
    round: Callable[[Tensor, torch.dtype], Tensor] = _round
    write: Callable[[Tensor], Tensor] = _same
    log: Callable[[Tensor], Tensor] = torch.log
    delta: Callable[[Tensor, Tensor], Tensor] = lambda dout, out: (dout * out).sum(-1, keepdim=True)
    dquery: Callable[[Tensor, float], Tensor] = lambda dq, scale: scale * dq
    dkey: Callable[[Tensor, float], Tensor] = lambda dk, scale: scale * dk
    dscores: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda p, dp, delta: p * (dp - delta)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[int],
        scale: float,
        queries: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q, k, v (B, L, N, D) -> out (B, L, N, D) and log-sum-exp (B, N, L).

        queries: how many of each sample there are, where they are not the tokens of the keys
        """
        out = torch.zeros_like(q)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        for item, length in enumerate(lengths):
            rows = self.num_queries((queries or lengths)[item], q.shape[1])
            if length and rows:
                asking, keys, values = (x[item].transpose(0, 1) for x in (q, k, v))
                result, lse[item, :, :rows] = self._sample(
                    asking[:, :rows], keys, values, length, scale
                )
                out[item, :rows] = result.transpose(0, 1)
        return self.write(out), lse

    def _sample(
        self, q: Tensor, k: Tensor, v: Tensor, length: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        num_keys = min(self.num_keys(length), k.shape[1])
        queries, scale = self.query(q, scale)
        highest = torch.full((*q.shape[:2], 1), -torch.inf)
        total = torch.zeros_like(highest)
        accumulated = torch.zeros(q.shape)
        for index, start in enumerate(range(0, num_keys, self.block)):
            tile = slice(start, min(start + self.block, num_keys))
            scores = scale * (queries.float() @ k[:, tile].float().mT)
            higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
            p = self.exp(scores - higher)
            correction = self.correction(self.exp(highest - higher), index)
            total = total * correction + self.row_sum(p, q.dtype)
            weights = self.tile(self.round_probabilities(p, q.dtype).float(), index)
            accumulated = self.accumulator(accumulated * correction + weights @ v[:, tile].float())
            highest = higher
        lse = (highest + self.log(total))[..., 0]
        return self.round(accumulated / total, q.dtype), lse

    def backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[int],
        scale: float,
        queries: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients like q, k and v."""
        gradients = tuple(torch.zeros_like(x) for x in (q, k, v))
        for item, length in enumerate(lengths):
            rows = self.num_queries((queries or lengths)[item], q.shape[1])
            if not length or not rows:
                continue
            keys = self.num_keys(length)
            asking, douts, outs = (x[item, :rows].transpose(0, 1).float() for x in (q, dout, out))
            keys, values = (x[item, :keys].transpose(0, 1).float() for x in (k, v))
            scores = scale * (asking @ keys.mT)
            p = self.exp(scores - lse[item, :, :rows, None])
            dp = douts @ values.mT
            ds = self.dscores(p, dp, self.delta(douts, outs))
            ds = self.round_probabilities(ds, q.dtype).float()
            p = self.round_probabilities(p, q.dtype).float()
            parts = (
                self.dquery(ds @ keys, scale),
                self.dkey(self._over_queries(ds, asking, q.dtype), scale),
                self._over_queries(p, douts, q.dtype),
            )
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[item, : part.shape[1]] = self.round(part, q.dtype).transpose(0, 1)
        return gradients

    def _over_queries(self, weights: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """weights^T x, summed over the queries in the precision the kernel keeps."""
        if self.gradient_block is None:
            return weights.mT @ x
        total = torch.zeros(weights.shape[0], weights.shape[2], x.shape[2])
        for start in range(0, x.shape[1], self.gradient_block):
            rows = slice(start, start + self.gradient_block)
            total = (total + weights[:, rows].mT @ x[:, rows]).to(dtype).float()
        return total


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    queries: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention sample by sample in the dtype of q throughout: float64 gives the truth.

    Differentiable; q, k, v (B, L, N, D) -> out (B, L, N, D) and log-sum-exp (B, N, L).
    queries: as in ``FlashAttention.forward``
    """
    outs, sums = [], []
    for item, length in enumerate(lengths):
        asking = q[item, : (queries or lengths)[item]].transpose(0, 1)
        keys, values = (x[item, :length].transpose(0, 1) for x in (k, v))
        scores = (asking * scale) @ keys.mT
        out = (torch.softmax(scores, -1) @ values).transpose(0, 1)
        padding = q.shape[1] - asking.shape[1]
        outs.append(torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)))
        sums.append(torch.nn.functional.pad(scores.logsumexp(-1), (0, padding), value=-torch.inf))
    return torch.stack(outs), torch.stack(sums)
