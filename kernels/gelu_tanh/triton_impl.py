"""GELU in its tanh form in Triton: one program per block of a row.

Where all tensors are contiguous there is one row. With ``left``, the first programs of a row copy
it and the others compute, so that one kernel writes the whole row of y.
"""

import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from hunyuan_fast.kernels.gelu_tanh.config import triton_block

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715
_A = tl.constexpr(-_SLOPE * math.log2(math.e))
_B = tl.constexpr(-_SLOPE * math.log2(math.e) * _CUBIC)
_SLOPE_0 = tl.constexpr(_SLOPE)
_SLOPE_2 = tl.constexpr(3 * _SLOPE * _CUBIC)
# Beyond it exp(-2 u) is infinite or zero in fp32, and no power of x overflows within.
_BOUND = tl.constexpr(12.0)


@triton.jit
def _gelu(x):
    # x sigmoid(2 u) as x / (1 + exp(-2 u)); the numerator is bounded so that -inf gives -12 / inf
    low = tl.where(x < -_BOUND, -_BOUND, x)
    w = tl.where(x > _BOUND, _BOUND, low)
    e = tl.exp2(w * (w * w * _B + _A))
    return low / (1.0 + e)


@triton.jit
def _gelu_slope(x):
    # for x >= 0 s + q, else c - q, of s = sigmoid(|2 u|) and c = 1 - s, neither of which cancels
    magnitude = tl.abs(x)
    w = tl.where(magnitude > _BOUND, _BOUND, magnitude)
    square = w * w
    e = tl.exp2(w * (square * _B + _A))
    s = 1.0 / (1.0 + e)
    c = e * s
    q = w * (square * _SLOPE_2 + _SLOPE_0) * c * s
    return tl.where(x < 0.0, c - q, s + q)


@triton.jit
def _write_left(left_row, y_row, block, width, BLOCK: tl.constexpr):
    e = block * BLOCK + tl.arange(0, BLOCK)
    inside = e < width
    left = tl.load(left_row + e, mask=inside, eviction_policy="evict_first")
    tl.store(y_row + e, left, mask=inside)


@triton.jit
def _write_gelu(x_row, y_row, block, width, BLOCK: tl.constexpr):
    m = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = m < width
    x = tl.load(x_row + m, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(y_row + m, _gelu(x).to(y_row.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    length,
    width,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK)
    # int64: a row may start past element 2^31
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    b = row // length
    l = row % length
    x_row = x_ptr + b * stride_xb + l * stride_xl
    y_row = y_ptr + b * stride_yb + l * stride_yl
    _write_gelu(x_row, y_row, tl.program_id(0) % num_blocks, width, BLOCK)


@triton.jit
def _concat_kernel(
    left_ptr,
    x_ptr,
    y_ptr,
    length,
    left_width,
    width,
    stride_leftb,
    stride_leftl,
    stride_xb,
    stride_xl,
    BLOCK: tl.constexpr,
):
    left_blocks = tl.cdiv(left_width, BLOCK)
    num_blocks = left_blocks + tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    b = row // length
    l = row % length
    block = tl.program_id(0) % num_blocks
    y_row = y_ptr + row * (left_width + width)
    if block < left_blocks:
        left_row = left_ptr + b * stride_leftb + l * stride_leftl
        _write_left(left_row, y_row, block, left_width, BLOCK)
    else:
        x_row = x_ptr + b * stride_xb + l * stride_xl
        _write_gelu(x_row, y_row + left_width, block - left_blocks, width, BLOCK)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    length,
    width,
    stride_dyb,
    stride_dyl,
    stride_xb,
    stride_xl,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    b = row // length
    l = row % length
    m = (program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = m < width
    x_row = x_ptr + b * stride_xb + l * stride_xl
    dy_row = dy_ptr + b * stride_dyb + l * stride_dyl
    x = tl.load(x_row + m, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dy = tl.load(dy_row + m, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dx = dy * _gelu_slope(x)
    tl.store(dx_ptr + row * width + m, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def supports(x: Tensor, left: Tensor | None = None, out: Tensor | None = None) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    return None


def forward(x: Tensor, left: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y (..., M), or [left, y] (B, L, E + M); ``out`` if it is given, written into."""
    if left is not None:
        return _forward_concat(x, left)
    y = x.new_empty(x.shape) if out is None else out
    if not x.numel():
        return y
    if y.is_contiguous():
        x_rows, y_rows = _one_row_if_contiguous(x, y)
    else:
        x_rows, y_rows = _rows(x), _rows_or_none(y)
        if y_rows is None:
            return y.copy_(forward(x))
    batch, length, width = x_rows.shape
    config = triton_block(width, x.element_size())
    with _device_of(x):
        _forward_kernel[(batch * length * triton.cdiv(width, config.block),)](
            x_rows,
            y_rows,
            length,
            width,
            x_rows.stride(0),
            x_rows.stride(1),
            y_rows.stride(0),
            y_rows.stride(1),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return y


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx (..., M)."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx
    dy_rows, x_rows = _one_row_if_contiguous(dy, x)
    batch, length, width = x_rows.shape
    config = triton_block(width, x.element_size())
    with _device_of(x):
        _backward_kernel[(batch * length * triton.cdiv(width, config.block),)](
            dy_rows,
            x_rows,
            dx,
            length,
            width,
            dy_rows.stride(0),
            dy_rows.stride(1),
            x_rows.stride(0),
            x_rows.stride(1),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return dx


def _forward_concat(x: Tensor, left: Tensor) -> Tensor:
    batch, length, width = x.shape
    left_width = left.shape[-1]
    y = x.new_empty((batch, length, left_width + width))
    if not y.numel():
        return y
    left, x = _rows(left), _rows(x)
    config = triton_block(max(left_width, width), x.element_size())
    blocks = triton.cdiv(left_width, config.block) + triton.cdiv(width, config.block)
    with _device_of(x):
        _concat_kernel[(batch * length * blocks,)](
            left,
            x,
            y,
            length,
            left_width,
            width,
            left.stride(0),
            left.stride(1),
            x.stride(0),
            x.stride(1),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return y


def _one_row_if_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    if all(t.is_contiguous() for t in tensors):
        return tuple(t.view(1, 1, -1) for t in tensors)
    return tuple(_rows(t) for t in tensors)


def _rows(t: Tensor) -> Tensor:
    """The tensor as (B, L, M) with M contiguous: a view where there is one, else a copy."""
    rows = _rows_or_none(t)
    if rows is None:
        rows = _rows_or_none(t.contiguous())
        assert rows is not None, "a contiguous tensor has rows"
    return rows


def _rows_or_none(t: Tensor) -> Tensor | None:
    """A view of the tensor as (B, L, M) with M contiguous, where its strides allow one."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return None
    while t.dim() < 3:
        t = t[None]
    if t.dim() == 3:
        return t
    try:
        return t.view(-1, *t.shape[-2:])
    except RuntimeError:
        return None


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
