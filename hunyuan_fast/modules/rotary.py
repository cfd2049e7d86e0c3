"""Cosine and sine tables of the 3D rotary position embedding."""

import functools

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]


def rotary_tables(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float, device: torch.device
) -> Tables:
    """Tables for a latent grid, computed once per grid and device.

    grid: tokens along (T, H, W)    dims: features turned by each axis, even, D in all
    returns: cos, sin, each (T * H * W, D), float32; features 2k and 2k + 1 share an angle

    Under ``torch.compile`` the tables become part of the graph instead.
    """
    if torch.compiler.is_compiling():
        return build_rotary_tables(grid, dims, theta, device)
    return _cached_tables(grid, dims, theta, device)


@functools.lru_cache(maxsize=4)
def _cached_tables(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float, device: torch.device
) -> Tables:
    # A table first made under inference mode could not be saved for a backward pass later on.
    with torch.inference_mode(False), torch.no_grad():
        return build_rotary_tables(grid, dims, theta, device)


def build_rotary_tables(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float, device: torch.device
) -> Tables:
    """Angles ``position * theta^(-2k / d)`` for each axis of d features, axes in the order T, H, W.

    Positions are 0, 1, 2, ... along each axis, without rescaling.
    Source: technical report, section 4.2; Su et al., "RoFormer", section 3.2.
    """
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, dims, strict=True)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        positions = torch.arange(length, dtype=torch.float32, device=device)
        along = torch.outer(positions, 1.0 / theta**exponents)  # (length, dim / 2)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(along.view(shape).expand(*grid, dim // 2))
    joint = torch.cat(angles, dim=-1).flatten(0, 2).repeat_interleave(2, dim=-1)
    return joint.cos(), joint.sin()
