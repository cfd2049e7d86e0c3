"""Cutting a clip into overlapping tiles and blending the results, as the released pipelines do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Windows over a clip, and their starts; where two overlap, their results are blended linearly.

    size, size_stride: pixels of height and width that a tile covers, and between two starts
    frames, frames_stride: the same in time, beside the first frame of a tile, which stands alone

    The defaults are the official pipeline's. Raises ValueError for strides outside 1..window.
    """

    size: int = 256
    size_stride: int = 192
    frames: int = 64
    frames_stride: int = 48

    def __post_init__(self) -> None:
        for name in ("size", "frames"):
            window, stride = getattr(self, name), getattr(self, f"{name}_stride")
            if not 1 <= stride <= window:
                raise ValueError(f"{name}_stride must be in 1..{name} = {window}, got {stride}")


PRESETS = {"official": Tiling(), "diffusers": Tiling(frames=16, frames_stride=12)}


@dataclass(frozen=True)
class Window:
    """One axis: `size` and `stride` of what goes in, `kept` and `blend` of what comes out."""

    size: int
    stride: int
    kept: int
    blend: int


def pixel_window(size: int, stride: int, ratio: int) -> Window:
    """The window of an axis that encoding makes `ratio` times smaller."""
    _check_divisible(size, stride, ratio)
    return Window(size, stride, stride // ratio, (size - stride) // ratio)


def latent_window(size: int, stride: int, ratio: int) -> Window:
    """The window of an axis that decoding makes `ratio` times larger."""
    _check_divisible(size, stride, ratio)
    return Window(size // ratio, stride // ratio, stride, size - stride)


def _check_divisible(size: int, stride: int, ratio: int) -> None:
    if size % ratio or stride % ratio:
        raise ValueError(
            f"tiles must be whole latents: window {size} and stride {stride} must be multiples "
            f"of {ratio}"
        )


def map_tiles(run: Callable[[Tensor], Tensor], x: Tensor, space: Window, time: Window) -> Tensor:
    """Apply run to tiles of x (B, C, T, H, W) and blend; axes that fit in one window stay whole.

    Time is cut when T exceeds its window; space, inside each cut, when H or W exceeds its own.
    """

    def run_frames(part: Tensor) -> Tensor:
        if max(part.shape[3:]) > space.size:
            return _map_space(run, part, space)
        return run(part)

    return _map_time(run_frames, x, time) if x.shape[2] > time.size else run_frames(x)


def _map_space(run: Callable[[Tensor], Tensor], x: Tensor, window: Window) -> Tensor:
    """Each tile fades in from the finished tile above, then from the finished one to the left."""
    size, kept = window.size, window.kept
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[3], window.stride):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[4], window.stride)):
            tile = run(x[:, :, :, top : top + size, left : left + size])
            if above:
                tile = _fade(above[column], tile, window.blend, dim=3)
            if row:
                tile = _fade(row[-1], tile, window.blend, dim=4)
            row.append(tile)
        rows.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=4))
        above = row
    return torch.cat(rows, dim=3)


def _map_time(run: Callable[[Tensor], Tensor], x: Tensor, window: Window) -> Tensor:
    """Every window but the first gives up its first result: that of a frame without past."""
    previous = run(x[:, :, : window.size + 1])
    parts = [previous[:, :, : window.kept + 1]]
    # a window that starts on the last frame would have nothing left to give
    for start in range(window.stride, x.shape[2] - 1, window.stride):
        tile = run(x[:, :, start : start + window.size + 1])[:, :, 1:]
        previous = _fade(previous, tile, window.blend, dim=2)
        parts.append(previous[:, :, : window.kept])
    return torch.cat(parts, dim=2)


def _fade(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, its first `extent` steps along dim fading in from the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    ramp = torch.arange(extent, dtype=torch.float32, device=after.device) / extent
    ramp = ramp.view([-1 if d == dim else 1 for d in range(after.ndim)])
    tail, head = (
        before.narrow(dim, before.shape[dim] - extent, extent),
        after.narrow(dim, 0, extent),
    )
    mixed = (tail * (1 - ramp) + head * ramp).to(after.dtype)
    return torch.cat([mixed, after.narrow(dim, extent, after.shape[dim] - extent)], dim)
