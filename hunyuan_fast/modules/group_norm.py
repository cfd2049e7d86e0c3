"""Group normalisation of the VAE with SiLU; statistics stay exact however large the clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Values the CPU handles at a time: a few fp32 blocks of this size stay in the second-level cache.
_BLOCK = 1 << 17
# Elsewhere: few launches, and little memory beside the map.
_DEVICE_BLOCK = 1 << 24


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = True,
    stats: Tensor | None = None,
) -> Tensor:
    """SiLU of the group norm of x; statistics over T, H, W and the group's channels together.

    x (B, C, T, H, W), any floating dtype; weight, bias (C,). Returns the shape and dtype of x,
    channels-last on the CPU. Computed in fp32 (fp64 for fp64) and rounded once on the CPU.
    silu: False leaves the SiLU out.
    stats: (3, B, G) of `group_norm_stats`, to be used instead of x's own: those of a whole clip
        when x is a part of it. Nothing is recorded for a backward pass then.
    """
    if stats is not None:
        mean, rstd = _mean_rstd(stats, eps, torch.promote_types(x.dtype, torch.float32))
        return _apply(x, *_affine(mean, rstd, weight, bias), silu=silu)
    if x.device.type != "cpu" or not silu:
        normed = F.group_norm(x, num_groups, weight, bias, eps)
        return F.silu(normed) if silu else normed
    return _GroupNormSiLU.apply(x, num_groups, weight, bias, eps)


@torch.no_grad()
def group_norm_stats(x: Tensor, num_groups: int) -> Tensor:
    """What a group norm needs to know of x (B, C, T, H, W), to be merged with that of other parts.

    Returns (3, B, G) float64: number of values, mean, sum of squared deviations from the mean.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    mean, variance = _moments(x, num_groups)
    count = torch.full_like(mean, x[0].numel() // num_groups, dtype=torch.float64)
    return torch.stack((count, mean.double(), variance.double() * count))


def merge_group_norm_stats(parts: Sequence[Tensor]) -> Tensor:
    """The statistics (3, B, G) of several parts together, merged in their order.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979.
    """
    if not parts:
        raise ValueError("parts must hold at least one tensor of statistics, got none")
    count, mean, squares = parts[0]
    for part in parts[1:]:
        n, m, s = part
        total, delta = count + n, m - mean
        squares = squares + s + delta.square() * (count * n / total)
        mean = mean + delta * (n / total)
        count = total
    return torch.stack((count, mean, squares))


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
        out = _apply(x, *_affine(mean, rstd, weight, bias), silu=True)
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
    size = _BLOCK if maps[0].device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, size // maps[0].shape[1])
    for sample, *lines in zip(range(len(maps[0])), *vectors, strict=True):
        flat = (x[sample].movedim(0, -1).flatten(0, -2).split(rows) for x in maps)
        for blocks in zip(*flat, strict=True):
            yield *blocks, *lines


def _apply(x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool) -> Tensor:
    """x * scale + shift, then SiLU if asked for; scale, shift (B, C)."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    out = torch.empty_like(x)
    for value, result, a, b in _blocks((x, out), scale, shift):
        normed = torch.addcmul(b, value.to(scale.dtype), a)
        result.copy_(F.silu(normed, inplace=True) if silu else normed)
    return out


def _statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation, (B, G), of a channels-last map."""
    mean, variance = _moments(x, num_groups)
    return mean, (variance + eps).rsqrt()


def _mean_rstd(stats: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation, (B, G), of merged statistics."""
    count, mean, squares = stats
    return mean.to(dtype), (squares / count + eps).rsqrt().to(dtype)


def _moments(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, (B, G), of a channels-last map: each block about its own means, merged.

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
    share = torch.tensor(sizes, dtype=dtype, device=x.device).view(len(x), -1, 1, 1) / count
    part = torch.stack(means).view(shape)
    mean = (part * share).sum((1, 3))
    between = ((part - mean[:, None, :, None]).square() * share).sum((1, 3))
    within = torch.stack(squares).view(shape).sum((1, 3)) / count
    return mean, between + within


def _affine(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The group norm as x * scale + shift, each (B, C)."""
    gamma, beta = (p.to(mean.dtype).view(mean.shape[1], -1) for p in (weight, bias))
    scale = rstd[..., None] * gamma
    return scale.flatten(1), (beta - mean[..., None] * scale).flatten(1)
