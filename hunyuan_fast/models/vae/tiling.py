"""Cutting a clip into overlapping tiles and blending the results, as the released pipelines do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Window and step of the tiles in pixels and frames; what overlaps is blended linearly.

    A temporal tile has `frames + 1` frames, because the first frame of every tile stands alone.
    """

    size: int = 256
    size_stride: int = 192
    frames: int = 64
    frames_stride: int = 48


PRESETS = {
    "official": Tiling(),
    "diffusers": Tiling(frames=16, frames_stride=12),
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One side's window, step and blend; `window` and `stride` of the input, `out_*` of the output."""

    window: int
    stride: int
    out_stride: int
    blend: int


def blend(previous: Tensor, current: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the end of `previous` into the start of `current` over at most `extent` steps of dim."""
    extent = min(previous.shape[dim], current.shape[dim], extent)
    if extent == 0:
        return current
    shape = [1] * current.ndim
    shape[dim] = extent
    fade = (torch.arange(extent, device=current.device, dtype=torch.float32) / extent).view(shape)
    tail = previous.narrow(dim, previous.shape[dim] - extent, extent)
    head = (tail * (1 - fade) + current.narrow(dim, 0, extent) * fade).to(current.dtype)
    return torch.cat([head, current.narrow(dim, extent, current.shape[dim] - extent)], dim)


def map_spatial_tiles(run: Callable[[Tensor], Tensor], x: Tensor, axis: Axis) -> Tensor:
    """Apply run to square tiles of x (B, C, T, H, W) and blend the results into one tensor.

    Every tile is blended with the finished tile above it, then with the finished tile to its left.
    """
    rows = []
    above: list[Tensor] = []
    for top in range(0, x.shape[3], axis.stride):
        tiles: list[Tensor] = []
        for left in range(0, x.shape[4], axis.stride):
            tile = run(x[:, :, :, top : top + axis.window, left : left + axis.window])
            if above:
                tile = blend(above[len(tiles)], tile, axis.blend, dim=3)
            if tiles:
                tile = blend(tiles[-1], tile, axis.blend, dim=4)
            tiles.append(tile)
        rows.append(torch.cat([tile[..., : axis.out_stride, : axis.out_stride] for tile in tiles], dim=4))
        above = tiles
    return torch.cat(rows, dim=3)


def map_temporal_tiles(run: Callable[[Tensor], Tensor], x: Tensor, axis: Axis) -> Tensor:
    """Apply run to windows of x (B, C, T, H, W) in time and blend the results into one tensor.

    Every window but the first gives up its own first result, which stands for a frame without past.
    """
    parts: list[Tensor] = []
    previous: Tensor | None = None
    # a window that starts on the last frame would have nothing left to give
    for start in range(0, max(x.shape[2] - 1, 1), axis.stride):
        tile = run(x[:, :, start : start + axis.window + 1])
        if previous is None:
            parts.append(tile[:, :, : axis.out_stride + 1])
        else:
            tile = blend(previous, tile[:, :, 1:], axis.blend, dim=2)
            parts.append(tile[:, :, : axis.out_stride])
        previous = tile
    return torch.cat(parts, dim=2)
