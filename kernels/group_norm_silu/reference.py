"""Group norm with SiLU in plain PyTorch: the specification of the other implementations.

Frame by frame, so that no copy of a whole clip in a wider dtype is ever made.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})
# From here on the logistic function is exactly zero or one, in float64 too.
_BOUND = 1000.0
Lines = tuple[Tensor, Tensor, Tensor]


def example(device: torch.device) -> tuple[Tensor, int, Tensor, Tensor, float, bool]:
    """Arguments of a typical call."""
    x = torch.zeros(1, 128, 3, 16, 16, dtype=torch.bfloat16, device=device)
    weight = torch.ones(128, dtype=torch.bfloat16, device=device)
    return x, 32, weight, weight, 1e-6, True


def supports(*_: object) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def statistics(x: Tensor, num_groups: int) -> Tensor:
    """Count, mean and sum of squared deviations of every sample and group, (3, B, G) float64."""
    if not x.numel():
        return torch.zeros((3, len(x), num_groups), dtype=torch.float64, device=x.device)
    return merge([_of_frame(frame, num_groups) for frame in x.unbind(2)])


def merge(parts: Sequence[Tensor]) -> Tensor:
    """The statistics of all values, from those of their parts, one part after the other."""
    count, mean, squares = parts[0]
    for more, other_mean, other_squares in parts[1:]:
        total = count + more
        share = more / total.clamp_min(1)  # an empty part has no mean to speak of
        distance = other_mean - mean
        squares = squares + other_squares + distance.square() * count * share
        mean = mean + distance * share
        count = total
    return torch.stack((count, mean, squares))


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y like x, channels-last, and the statistics of x where none were given."""
    own = statistics(x, num_groups) if stats is None else None
    used = own if stats is None else stats
    assert used is not None
    lines = affine(used, weight, bias, eps, _wide_dtype(x))
    y = torch.empty_like(x, memory_format=torch.channels_last_3d)
    for frame, out in _frames(x, y):
        _, z = _apply(frame, lines)
        out.copy_(z.clamp_min(-_BOUND) * torch.sigmoid(z) if silu else z)
    return y, own


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, channels-last, and the gradients of weight and bias, (C,)."""
    dtype = _wide_dtype(x)
    if not x.numel():
        nothing = torch.zeros(len(weight), dtype=dtype, device=x.device)
        return torch.empty_like(x, memory_format=torch.channels_last_3d), nothing, nothing.clone()
    lines = affine(stats, weight, bias, eps, dtype)
    sums = torch.zeros((2, *x.shape[:2]), dtype=torch.float64, device=x.device)
    for frame, gradient in _frames(x, dy):
        centred, z = _apply(frame, lines)
        dz = _through_silu(gradient.to(dtype), z, silu)
        sums[0] += dz.sum((2, 3), dtype=torch.float64)
        sums[1] += (dz * centred).sum((2, 3), dtype=torch.float64)
    dweight, dbias, slope, level = gradients(sums, stats, weight, eps, dtype)
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d)
    for frame, gradient, out in _frames(x, dy, dx):
        centred, z = _apply(frame, lines)
        dz = _through_silu(gradient.to(dtype), z, silu)
        out.copy_(dz * _of_places(lines[1]) + centred * _of_places(slope) + _of_places(level))
    return dx, dweight, dbias


def affine(stats: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Lines:
    """centre, scale and shift (B, C): z is (x - centre) scale + shift."""
    mean, rstd = _moments(stats, weight, eps)
    centre = mean.to(dtype)
    scale = rstd * weight.double()
    shift = bias.double() - (mean - centre.double()) * scale
    return centre, scale.to(dtype), shift.to(dtype)


def gradients(
    sums: Tensor, stats: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dweight and dbias (C,), and slope and level (B, C) of dx = dz scale + centred slope + level.

    sums: over the places of a sample, of dz and of dz (x - centre), (2, B, C) in float64.
    """
    mean, rstd = _moments(stats, weight, eps)
    rest = mean - mean.to(dtype).double()
    total, product = sums
    product = (product - rest * total) * rstd  # of dz n
    groups, channels = stats.shape[2], len(weight) // stats.shape[2]
    of_group = (weight.double() * torch.stack((product, total))).unflatten(2, (groups, channels))
    means = of_group.sum(-1) / stats[0]
    along, level = means.repeat_interleave(channels, dim=2)
    slope = -along * rstd.square()
    level = -level * rstd - slope * rest
    return product.sum(0).to(dtype), total.sum(0).to(dtype), slope.to(dtype), level.to(dtype)


def _of_frame(frame: Tensor, num_groups: int) -> Tensor:
    """The statistics of one frame (B, C, H, W)."""
    values = frame.double().reshape(len(frame), num_groups, -1)
    mean = values.mean(-1)
    squares = (values - mean[..., None]).square().sum(-1)
    return torch.stack((torch.full_like(mean, values.shape[-1]), mean, squares))


def _moments(stats: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of the group of every channel, (B, C) float64."""
    count, mean, squares = stats
    both = torch.stack((mean, (squares / count + eps).rsqrt()))
    mean, rstd = both.repeat_interleave(len(weight) // stats.shape[2], dim=2)
    return mean, rstd


def _frames(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The frames (B, C, H, W) of maps, together."""
    return zip(*(t.unbind(2) for t in maps), strict=True)


def _apply(frame: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """x - centre, and z."""
    centre, scale, shift = (_of_places(line) for line in lines)
    centred = frame.to(centre.dtype) - centre
    return centred, centred * scale + shift


def _through_silu(dy: Tensor, z: Tensor, silu: bool) -> Tensor:
    if not silu:
        return dy
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return dy * (s + z.clamp(-_BOUND, _BOUND) * s * rest)


def _of_places(line: Tensor) -> Tensor:
    return line[..., None, None]


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
