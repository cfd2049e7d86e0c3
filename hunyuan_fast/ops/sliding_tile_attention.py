"""Attention of video tokens over the tiles around their own, with text always in sight.

Formula and contract: ``hunyuan_fast.kernels.sliding_tile_attention``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.attention_checks import (
    check_kv_len,
    check_lengths,
    check_out,
    check_tensors,
)
from hunyuan_fast.ops.attention_results import fake_backward, fake_forward, fake_out
from hunyuan_fast.ops.memory import check_apart
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "sliding_tile_attention"
_MOST_TILES = torch.iinfo(torch.int32).max
Sizes = tuple[int, int, int]
Windows = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class SlidingTiles:
    """Who sees whom, for calls of :func:`hunyuan_fast.ops.attention`.

    grid, tile, windows: as in :func:`sliding_tile_attention`; windows in a tensor on the device
        are not copied there at every call.
    """

    grid: Sequence[int]
    tile: Sequence[int]
    windows: Windows

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """:func:`sliding_tile_attention` of this pattern; options as there."""
        return sliding_tile_attention(
            q, k, v, grid=self.grid, tile=self.tile, windows=self.windows, **options
        )

    def of_heads(self, heads: slice, q: Tensor) -> "SlidingTiles":
        """The same for some of the heads of q (B, L, N, D), on its device.

        Raises TypeError or ValueError for what is wrong with any head: whoever takes the others
        learns it as well.
        """
        windows = _read_windows(self.windows, q)
        if not torch.compiler.is_compiling():
            _check_windows(windows)
        return SlidingTiles(self.grid, self.tile, windows[heads])


def sliding_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    tile: Sequence[int],
    windows: Windows,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a video token sees the tiles around its own, and all of the text.

    q, k, v: (B, L, N, D), one floating-point dtype, any strides; the video tokens come first, in
        raster order.
    grid: video tokens along (T, H, W), any numbers; T H W is at most L, and what follows is text,
        which sees everything and is seen by all.
    tile: tokens of a tile along (T, H, W); the last tile of an axis is smaller where need be.
    windows: tiles along (T, H, W) that a tile sees, itself included, at least 1: three ints, or
        three for each head, or such a tensor (N, 3), int32 or int64, on the device of q. Windows
        slide, and stop at the borders of the grid; one of odd length lies around its tile, an even
        one begins a tile earlier than it ends later. More tiles than the grid has: all of them.
    kv_len, scale, out, return_lse: as in :func:`hunyuan_fast.ops.attention`.

    Returns (B, L, N, D), or that and the log-sum-exp.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit (windows and lengths on
    a GPU are not looked at: the host would have to wait).
    """
    check_tensors(q, k, v)
    sizes = *_read_sizes("grid", grid), *_read_sizes("tile", tile)
    if sizes[0] * sizes[1] * sizes[2] > q.shape[1]:
        raise ValueError(
            f"grid must have at most L = {q.shape[1]} tokens, the length of q, got {tuple(grid)}"
        )
    windows = _read_windows(windows, q)
    if kv_len is not None:
        check_kv_len(kv_len, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if out is None:
        out, lse = _forward(q, k, v, windows, *sizes, kv_len, scale)
    else:
        check_out(out, q, k, v)
        lse = _forward_out(q, k, v, windows, *sizes, kv_len, scale, out)
    return (out, lse) if return_lse else out


def _arguments(q: Tensor, k: Tensor, v: Tensor, windows: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Operators take six ints for the sizes; implementations, two times three.

    A tile beyond the grid is the whole of it, and kernels need not count further.
    """
    grid, tile = rest[:3], tuple(map(min, rest[3:6], rest[:3]))
    return q, k, v, windows, grid, tile, *rest[6:]


def _forward_kernel(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    args = _arguments(q, *rest)
    _check_values(*args)
    return select(_ROOM, *args).forward(*args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, windows, *sizes, kv_len, scale = inputs
    out, lse = output
    ctx.sizes, ctx.scale = sizes, scale
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, q, k, v, windows, kv_len)


def _gradients(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    nothing = [None] * 9
    if dout is None:
        return None, None, None, *nothing
    *tensors, kv_len = ctx.saved_tensors
    return *_backward(dout, *tensors, *ctx.sizes, kv_len, ctx.scale), *nothing


def _out_kernel(q: Tensor, *rest: Any) -> Tensor:
    args = _arguments(q, *rest)
    _check_values(*args)
    check_apart(args[-1], q=q, k=args[1], v=args[2])
    _, lse = select(_ROOM, *args).forward(*args)
    return lse


def _backward_kernel(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    args = _arguments(q, *rest)
    return select(_ROOM, *args).backward(dout, out, lse, *args)


_SIZES = ", ".join(f"SymInt {name}_{axis}" for name in ("grid", "tile") for axis in "thw")
_SCHEMA = f"Tensor q, Tensor k, Tensor v, Tensor windows, {_SIZES}, Tensor? kv_len, float scale"
_forward = define(
    f"{_ROOM}({_SCHEMA}) -> (Tensor, Tensor)",
    _forward_kernel,
    fake_forward,
    save=_save,
    gradients=_gradients,
)
_forward_out = define(f"{_ROOM}_out({_SCHEMA}, Tensor(a!) out) -> Tensor", _out_kernel, fake_out)
_backward = define(
    f"{_ROOM}_bwd(Tensor dout, Tensor out, Tensor lse, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake_backward,
    gradients=refuse_second_derivative(_ROOM),
)


def _read_sizes(name: str, sizes: Sequence[int]) -> Sizes:
    """Three positive ints along (T, H, W); symbolic ones stay symbolic."""
    if not isinstance(sizes, (tuple, list, torch.Size)) or len(sizes) != 3:
        raise ValueError(f"{name} must be three ints along (T, H, W), got {sizes!r}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name} must be three ints along (T, H, W), got {sizes!r}")
        if size < 1:
            raise ValueError(f"{name} must be positive along (T, H, W), got {tuple(sizes)}")
    t, h, w = sizes
    return t, h, w


def _read_windows(windows: Windows, q: Tensor) -> Tensor:
    """Windows (N, 3) int32 on the device of q."""
    num_heads = q.shape[2]
    if not isinstance(windows, Tensor):
        rows = _as_rows(windows)
        if len(rows) not in (1, num_heads):
            raise ValueError(
                f"windows must be three ints for each of {num_heads} heads, or three for all, "
                f"got {len(rows)} times three"
            )
        windows = torch.tensor(rows, dtype=torch.int32, device=q.device)
        return windows.expand(num_heads, 3).contiguous()
    if windows.shape != (num_heads, 3):
        raise ValueError(f"windows must be (N, 3) = ({num_heads}, 3), got {tuple(windows.shape)}")
    if windows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"windows must be int32 or int64, got {windows.dtype}")
    if windows.device != q.device:
        raise ValueError(f"windows must be on the device of q, {q.device}, got {windows.device}")
    if windows.dtype == torch.int64:  # no number may become another one
        windows = windows.clamp(-_MOST_TILES, _MOST_TILES)
    return windows.to(torch.int32)


def _as_rows(windows: Any) -> list[list[int]]:
    """One window, or one for each head, as lists."""
    if not isinstance(windows, (tuple, list)) or not windows:
        raise TypeError(f"windows must be ints or a tensor (N, 3), got {windows!r}")
    each = windows if isinstance(windows[0], (tuple, list)) else [windows]
    for row in each:
        whole = isinstance(row, (tuple, list)) and all(type(size) is int for size in row)
        if not whole or len(row) != 3:
            raise TypeError(f"windows must be three ints, or three for each head, got {windows!r}")
        if min(row) < 1:
            raise ValueError(f"windows must be at least 1 tile along each axis, got {windows!r}")
    return [[min(size, _MOST_TILES) for size in row] for row in each]


def _check_values(q: Tensor, k: Tensor, v: Tensor, windows: Tensor, *rest: Any) -> None:
    """What only a kernel may look at, on a CPU."""
    check_lengths(rest[2], q.shape[1])
    _check_windows(windows)


def _check_windows(windows: Tensor) -> None:
    """At least one tile along each axis; windows on a GPU are not looked at."""
    if windows.device.type == "cpu" and windows.numel() and int(windows.min()) < 1:
        raise ValueError(f"windows must be at least 1 tile along each axis, got {windows.tolist()}")
