"""Cutting a clip into overlapping tiles and blending the results, as the released pipelines do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from hunyuan_fast.models.vae.layers import Rows, Size

Box = tuple[Rows, Rows, Rows]  # of time, height and width


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


def tile_boxes(size: Size, space: Window, time: Window) -> list[Box]:
    """The tiles of a clip of this size, in the order in which their results are blended.

    Time is cut when T exceeds its window; space, inside each cut, when H or W exceeds its own.
    """
    frames, height, width = size
    return list(product(_times(frames, time), *_areas(height, width, space)))


def part_of(x: Tensor, box: Box) -> Tensor:
    """A tile of a clip (B, C, T, H, W), as a view."""
    frames, rows, columns = (slice(*span) for span in box)
    return x[:, :, frames, rows, columns]


def map_tiles(run: Callable[[Tensor], Tensor], x: Tensor, space: Window, time: Window) -> Tensor:
    """Apply run to tiles of x (B, C, T, H, W) and blend; axes that fit in one window stay whole."""
    size = x.shape[2], x.shape[3], x.shape[4]
    return blend_tiles(lambda box: run(part_of(x, box)), size, space, time)


def blend_tiles(run: Callable[[Box], Tensor], size: Size, space: Window, time: Window) -> Tensor:
    """Blend what run has for each tile of a clip of this size; it is asked in their order."""
    frames, height, width = size
    rows, columns = _areas(height, width, space)

    def run_frames(span: Rows) -> Tensor:
        if len(rows) == len(columns) == 1:
            return run((span, rows[0], columns[0]))
        return _blend_space(lambda row, column: run((span, row, column)), rows, columns, space)

    spans = _times(frames, time)
    return _blend_time(run_frames, spans, time) if frames > time.size else run_frames(spans[0])


def _times(frames: int, window: Window) -> list[Rows]:
    """Frames of each window, which has one more than its size: a first one to give up."""
    if frames <= window.size:
        return [(0, frames)]
    # a window that starts on the last frame would have nothing left to give
    starts = [0, *range(window.stride, frames - 1, window.stride)]
    return [(start, min(start + window.size + 1, frames)) for start in starts]


def _areas(height: int, width: int, window: Window) -> tuple[list[Rows], list[Rows]]:
    """Rows and columns of tiles."""
    if max(height, width) <= window.size:
        return [(0, height)], [(0, width)]
    rows, columns = (
        [(start, min(start + window.size, length)) for start in range(0, length, window.stride)]
        for length in (height, width)
    )
    return rows, columns


def _blend_space(
    run: Callable[[Rows, Rows], Tensor], rows: list[Rows], columns: list[Rows], window: Window
) -> Tensor:
    """Each tile fades in from the finished tile above, then from the finished one to the left."""
    kept = window.kept
    parts: list[Tensor] = []
    above: list[Tensor] = []
    for height in rows:
        row: list[Tensor] = []
        for index, width in enumerate(columns):
            tile = run(height, width)
            if above:
                tile = _fade(above[index], tile, window.blend, dim=3)
            if row:
                tile = _fade(row[-1], tile, window.blend, dim=4)
            row.append(tile)
        parts.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=4))
        above = row
    return torch.cat(parts, dim=3)


def _blend_time(run: Callable[[Rows], Tensor], spans: list[Rows], window: Window) -> Tensor:
    """Every window but the first gives up its first result: that of a frame without past."""
    previous = run(spans[0])
    parts = [previous[:, :, : window.kept + 1]]
    for span in spans[1:]:
        previous = _fade(previous, run(span)[:, :, 1:], window.blend, dim=2)
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
