"""Group norm with SiLU in Triton: sums of chunks, merged by a second kernel, then one pass.

What is small, a number for each channel of a sample, is computed by torch in double precision, as
in the reference.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.group_norm_silu.config import Tile, rows_per_chunk, triton_tile
from hunyuan_fast.kernels.group_norm_silu.reference import affine, gradients
from hunyuan_fast.kernels.group_norm_silu.triton_kernels import (
    backward_kernel,
    forward_kernel,
    gradient_sums_kernel,
    merge_kernel,
    reduce_kernel,
    statistics_kernel,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MERGED, _REDUCE_PARTS, _REDUCE_COLUMNS = 1024, 64, 16


def supports(x: Tensor, *_: object) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    return None


def statistics(x: Tensor, num_groups: int) -> Tensor:
    """Count, mean and sum of squared deviations of every sample and group, (3, B, G) float64."""
    batch, channels = x.shape[:2]
    stats = x.new_zeros((3, batch, num_groups), dtype=torch.float64)
    if not x.numel():
        return stats
    rows = _rows(x)
    tile, chunk_rows, chunks = _chunks(rows)
    partials = x.new_empty((batch, chunks, 3, channels), dtype=torch.float32)
    moments = x.new_empty((batch, num_groups, 3), dtype=torch.float32)
    with _device_of(x):
        statistics_kernel[(chunks * triton.cdiv(channels, tile.channels), batch)](
            rows,
            partials,
            rows.shape[1],
            chunk_rows,
            rows.stride(0),
            C=channels,
            BLOCK_C=tile.channels,
            ROWS=tile.rows,
            num_warps=tile.num_warps,
        )
        block = triton.next_power_of_2(channels // num_groups)
        merge_kernel[(batch * num_groups,)](
            partials,
            moments,
            rows.shape[1],
            chunk_rows,
            chunks,
            num_groups,
            C=channels,
            CHANNELS=channels // num_groups,
            BLOCK=block,
            PARTS=max(1, _MERGED // block),
            num_warps=4,
        )
    coarse, fine, squares = moments.double().unbind(-1)
    stats[0], stats[1], stats[2] = x[0].numel() // num_groups, coarse + fine, squares
    return stats


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
    x = _last(x)
    own = statistics(x, num_groups) if stats is None else None
    used = own if stats is None else stats
    assert used is not None
    y = torch.empty_like(x, memory_format=torch.channels_last_3d)
    if not x.numel():
        return y, own
    rows = _rows(x)
    tile = triton_tile(rows.shape[2])
    lines = torch.stack(affine(used, weight, bias, eps, torch.float32), dim=1)
    with _device_of(x):
        forward_kernel[_tiles(rows, tile)](
            rows,
            y,
            lines,
            rows.shape[1],
            rows.stride(0),
            C=rows.shape[2],
            BLOCK_C=tile.channels,
            ROWS=tile.rows,
            SILU=silu,
            num_warps=tile.num_warps,
        )
    return y, own


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, channels-last, and the gradients of weight and bias, (C,)."""
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d)
    if not x.numel():
        nothing = x.new_zeros((2, len(weight)), dtype=torch.float32)
        return dx, nothing[0], nothing[1].clone()
    rows, dy_rows = _rows(x), _rows(dy)
    tile = triton_tile(rows.shape[2])
    lines = affine(stats, weight, bias, eps, torch.float32)
    with _device_of(x):
        sums = _gradient_sums(dy_rows, rows, torch.stack(lines, dim=1), silu).double()
        dweight, dbias, *more = gradients(sums.transpose(0, 1), stats, weight, eps, torch.float32)
        backward_kernel[_tiles(rows, tile)](
            dy_rows,
            rows,
            dx,
            torch.stack((*lines, *more), dim=1),
            rows.shape[1],
            dy_rows.stride(0),
            rows.stride(0),
            C=rows.shape[2],
            BLOCK_C=tile.channels,
            ROWS=tile.rows,
            SILU=silu,
            num_warps=tile.num_warps,
        )
    return dx, dweight, dbias


def _gradient_sums(dy: Tensor, x: Tensor, lines: Tensor, silu: bool) -> Tensor:
    """Over the places of each sample, of dz and of dz (x - centre), (B, 2, C)."""
    batch, _, channels = x.shape
    tile, chunk_rows, chunks = _chunks(x)
    partials = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
    sums = x.new_empty((batch, 2, channels), dtype=torch.float32)
    gradient_sums_kernel[(chunks * triton.cdiv(channels, tile.channels), batch)](
        dy,
        x,
        lines,
        partials,
        x.shape[1],
        chunk_rows,
        dy.stride(0),
        x.stride(0),
        C=channels,
        BLOCK_C=tile.channels,
        ROWS=tile.rows,
        SILU=silu,
        num_warps=tile.num_warps,
    )
    reduce_kernel[(triton.cdiv(2 * channels, _REDUCE_COLUMNS), batch)](
        partials,
        sums,
        chunks,
        WIDTH=2 * channels,
        PARTS=_REDUCE_PARTS,
        COLUMNS=_REDUCE_COLUMNS,
        num_warps=4,
    )
    return sums


def _chunks(rows: Tensor) -> tuple[Tile, int, int]:
    tile = triton_tile(rows.shape[2])
    chunk_rows = rows_per_chunk(rows.shape[1], tile)
    return tile, chunk_rows, triton.cdiv(rows.shape[1], chunk_rows)


def _tiles(rows: Tensor, tile: Tile) -> tuple[int, int]:
    batch, places, channels = rows.shape
    return triton.cdiv(places, tile.rows) * triton.cdiv(channels, tile.channels), batch


def _last(x: Tensor) -> Tensor:
    """x, or a copy of it whose samples are channels-last."""
    rows = x.movedim(1, -1)
    if len(x) and not rows[0].is_contiguous():
        return rows.contiguous().movedim(-1, 1)
    return x


def _rows(x: Tensor) -> Tensor:
    """x as (B, S, C) with contiguous samples: a view of channels-last memory, or a copy."""
    return _last(x).movedim(1, -1).flatten(1, 3)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
