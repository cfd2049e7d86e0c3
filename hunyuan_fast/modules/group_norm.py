"""Group normalisation of the VAE with SiLU; statistics stay exact however large the clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Values the CPU handles at a time: a few fp32 blocks of this size stay in the second-level cache.
_BLOCK = 1 << 17


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """SiLU of the group norm of x; statistics over T, H, W and the group's channels together.

    x (B, C, T, H, W), any floating dtype; weight, bias (C,). Returns the shape and dtype of x,
    channels-last on the CPU. Computed in fp32 (fp64 for fp64) and rounded once on the CPU.
    """
    if x.device.type != "cpu":
        return F.silu(F.group_norm(x, num_groups, weight, bias, eps))
    return _GroupNormSiLU.apply(x, num_groups, weight, bias, eps)


class GroupNormSiLU(nn.GroupNorm):
    """Group norm over (T, H, W) together, then SiLU. (B, C, T, H, W) -> same shape."""

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps)


class _GroupNormSiLU(torch.autograd.Function):
    """The channels-last form for the CPU, block by block, which keeps only x for the backward.

    torch adds the squares of channels-last values one by one in fp32, which costs digits on large
    maps, and its backward is several times slower than this one where channels are few.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        mean, rstd = _statistics(x, num_groups, eps)
        out = torch.empty_like(x)
        for value, result, scale, shift in _blocks((x, out), *_affine(mean, rstd, weight, bias)):
            normed = torch.addcmul(shift, value.to(scale.dtype), scale)
            result.copy_(F.silu(normed, inplace=True))
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        scale, shift = _affine(mean, rstd, weight, bias)
        dtype = scale.dtype

        dx = torch.empty_like(x)  # holds the gradient of the normed values at first
        sums = torch.zeros(2, *scale.shape, dtype=dtype)
        for value, g, result, a, b, total, total_x in _blocks((x, grad, dx), scale, shift, *sums):
            v = value.to(dtype)
            dnormed = torch.ops.aten.silu_backward(g.to(dtype), torch.addcmul(b, v, a))
            result.copy_(dnormed)
            total += dnormed.sum(0)
            total_x += dnormed.mul_(v).sum(0)

        batch, groups = mean.shape
        mean, rstd = mean[..., None], rstd[..., None]
        dbias, product = sums.view(2, batch, groups, -1)
        dweight = (product - mean * dbias) * rstd
        # what the group's mean and deviation take back: dx = dnormed * scale + slope * x + level
        gamma, count = weight.to(dtype).view(groups, -1), x[0].numel() // groups
        slope = -(gamma * dweight).sum(2, keepdim=True) * rstd.square() / count
        level = -(gamma * dbias).sum(2, keepdim=True) * rstd / count - slope * mean
        lines = (term.expand_as(dbias).reshape_as(scale) for term in (slope, level))
        for value, result, a, s, c in _blocks((x, dx), scale, *lines):
            rest = torch.addcmul(c, value.to(dtype), s)
            result.copy_(rest.addcmul_(result.to(dtype), a))
        dweight, dbias = dweight.sum(0).flatten(), dbias.sum(0).flatten()
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None


def _blocks(maps: tuple[Tensor, ...], *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of channels-last maps (B, C, ...) in blocks (rows, C), with their lines of (B, C)."""
    rows = max(1, _BLOCK // maps[0].shape[1])
    for sample, *lines in zip(range(len(maps[0])), *vectors, strict=True):
        flat = (x[sample].movedim(0, -1).flatten(0, -2).split(rows) for x in maps)
        for blocks in zip(*flat, strict=True):
            yield *blocks, *lines


def _statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation, (B, G): each block about its own means, then merged.

    No difference of large sums is ever taken, so a large mean costs no digits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sizes, means, squares = [], [], []
    for (value,) in _blocks((x,)):
        v = value.to(dtype)
        sizes.append(len(v))
        means.append(v.mean(0))
        squares.append((v - means[-1]).square_().sum(0))
    # (B, blocks, G, channels of a group)
    shape = (len(x), -1, num_groups, x.shape[1] // num_groups)
    count = x[0].numel() // num_groups
    share = torch.tensor(sizes, dtype=dtype).view(len(x), -1, 1, 1) / count
    part = torch.stack(means).view(shape)
    mean = (part * share).sum((1, 3))
    between = ((part - mean[:, None, :, None]).square() * share).sum((1, 3))
    within = torch.stack(squares).view(shape).sum((1, 3)) / count
    return mean, (between + within + eps).rsqrt()


def _affine(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The group norm as x * scale + shift, each (B, C)."""
    gamma, beta = (p.to(mean.dtype).view(mean.shape[1], -1) for p in (weight, bias))
    scale = rstd[..., None] * gamma
    return scale.flatten(1), (beta - mean[..., None] * scale).flatten(1)
