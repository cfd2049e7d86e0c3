"""Layer norm and modulation in Triton: one program per row forward, per chunk of rows backward.

A row is read once and stays in registers. dshift and dscale are summed in the registers of a chunk,
then over the chunks by a second kernel in a fixed order.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from hunyuan_fast.kernels.fused_modulation.config import (
    MAX_WIDTH,
    gpu_rows_per_chunk,
    triton_backward,
    triton_forward,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCE_CHUNKS, _REDUCE_BLOCK = 16, 128


@triton.jit
def _forward_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    length,
    stride_xb,
    stride_xl,
    stride_shift,
    stride_scale,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # int64: a row may start past element 2^31.
    row = tl.program_id(0).to(tl.int64)
    b = row // length
    l = row % length
    e = tl.arange(0, BLOCK_E)
    inside = e < E

    x_row = x_ptr + b * stride_xb + l * stride_xl
    x = tl.load(x_row + e, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    mean = tl.div_rn(tl.sum(x, axis=0), E * 1.0)
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=0), E * 1.0)
    rstd = tl.rsqrt(variance + eps)

    # Every program of the sample reads these again; they stay in the first-level cache.
    scale = tl.load(scale_ptr + b * stride_scale + e, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * stride_shift + e, mask=inside, other=0.0).to(tl.float32)
    y = centred * rstd * (1.0 + scale) + shift
    tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    length,
    num_chunks,
    chunk_rows,
    stride_dyb,
    stride_dyl,
    stride_xb,
    stride_xl,
    stride_scale,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    b = chunk // num_chunks
    first = (chunk % num_chunks) * chunk_rows
    num_rows = tl.minimum(chunk_rows, length - first)
    e = tl.arange(0, BLOCK_E)
    inside = e < E

    gain = 1.0 + tl.load(scale_ptr + b * stride_scale + e, mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros([BLOCK_E], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_E], dtype=tl.float32)
    for step in range(num_rows):
        l = first + step  # int64, which the counter of a loop need not be
        row = b * length + l
        dy_row = dy_ptr + b * stride_dyb + l * stride_dyl
        x_row = x_ptr + b * stride_xb + l * stride_xl
        dy = tl.load(dy_row + e, mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_row + e, mask=inside, other=0.0, eviction_policy="evict_first")
        dy = dy.to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x.to(tl.float32) - mean) * rstd, 0.0)
        g = dy * gain
        mean_g = tl.sum(g, axis=0) * (1.0 / E)
        mean_gn = tl.sum(g * normed, axis=0) * (1.0 / E)
        dx = (g - mean_g - normed * mean_gn) * rstd
        tl.store(dx_ptr + row * E + e, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dshift += dy
        dscale += dy * normed
    partial = partials_ptr + chunk * 2 * E + e
    tl.store(partial, dshift, mask=inside)
    tl.store(partial + E, dscale, mask=inside)


@triton.jit
def _reduce_kernel(
    partials_ptr,
    dshift_ptr,
    dscale_ptr,
    num_chunks,
    E: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # partials (B, num_chunks, 2, E) -> dshift, dscale (B, E)
    blocks = tl.cdiv(E, BLOCK_E)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    dshift = tl.zeros([BLOCK_E], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        partial = partials_ptr + (b * num_chunks + chunk)[:, None] * (2 * E) + e[None, :]
        mask = (chunk < num_chunks)[:, None] & inside[None, :]
        dshift += tl.sum(tl.load(partial, mask=mask, other=0.0), axis=0)
        dscale += tl.sum(tl.load(partial + E, mask=mask, other=0.0), axis=0)
    tl.store(dshift_ptr + b * E + e, dshift, mask=inside)
    tl.store(dscale_ptr + b * E + e, dscale, mask=inside)


def supports(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return f"the width E must be at most {MAX_WIDTH}, it is {x.shape[-1]}"
    return None


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E) and the mean and reciprocal standard deviation of every row (B, L)."""
    batch, length, width = x.shape
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty((batch, length), dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, mean, rstd
    x, shift, scale = (_rows(t) for t in (x, shift, scale))
    config = triton_forward(width)
    with _device_of(x):
        _forward_kernel[(batch * length,)](
            x,
            shift,
            scale,
            y,
            mean,
            rstd,
            length,
            x.stride(0),
            x.stride(1),
            shift.stride(0),
            scale.stride(0),
            eps,
            E=width,
            BLOCK_E=config.block,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, E), dshift and dscale (B, E)."""
    batch, length, width = x.shape
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, *(scale.new_zeros(scale.shape) for _ in range(2))
    dy, x, scale = (_rows(t) for t in (dy, x, scale))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    rows = gpu_rows_per_chunk(length)
    num_chunks = triton.cdiv(length, rows)
    partials = x.new_empty((batch, num_chunks, 2, width), dtype=torch.float32)
    dshift, dscale = (x.new_empty((batch, width), dtype=torch.float32) for _ in range(2))
    config = triton_backward(width)
    with _device_of(x):
        _backward_kernel[(batch * num_chunks,)](
            dy,
            x,
            scale,
            mean,
            rstd,
            dx,
            partials,
            length,
            num_chunks,
            rows,
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x.stride(1),
            scale.stride(0),
            E=width,
            BLOCK_E=config.block,
            num_warps=config.num_warps,
        )
        _reduce_kernel[(batch * triton.cdiv(width, _REDUCE_BLOCK),)](
            partials,
            dshift,
            dscale,
            num_chunks,
            E=width,
            BLOCK_CHUNKS=_REDUCE_CHUNKS,
            BLOCK_E=_REDUCE_BLOCK,
            num_warps=4,
        )
    return dx, dshift.to(scale.dtype), dscale.to(scale.dtype)


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
