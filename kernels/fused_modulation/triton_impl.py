"""Gated residual sum and adaptive layer norm in Triton: checks, allocations, launches.

The sums over tokens stay in the registers of a chunk's program; a second kernel adds up the chunks
in a fixed order. Where a sample has several vectors, a program hands over its sums whenever the
vector changes from one token to the next, which is rare: M costs no registers.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.fused_modulation.config import (
    MAX_VECTORS,
    gpu_rows_per_chunk,
    triton_backward,
    triton_forward,
    triton_max_width,
)
from hunyuan_fast.kernels.fused_modulation.triton_kernels import (
    backward_kernel,
    forward_kernel,
    reduce_kernel,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCE_CHUNKS, _REDUCE_BLOCK = 16, 128


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    both = scale is not None and gate is not None
    widest = triton_max_width(x.element_size(), both=both)
    if x.shape[-1] > widest:
        what = " with gate and norm at once" if both else ""
        return f"the width E must be at most {widest}{what}, it is {x.shape[-1]}"
    if index is not None:
        num_vectors = (gate if scale is None else scale).shape[1]  # type: ignore[union-attr]
        if num_vectors > MAX_VECTORS:
            return f"a sample may have at most {MAX_VECTORS} vectors, M is {num_vectors}"
    return None


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """residual and modulated (B, L, E), and stats (2, B, L): mean and rstd of every row."""
    batch, length, width = x.shape
    residual = None if gate is None else x.new_empty(x.shape)
    modulated = stats = mean = rstd = None
    if scale is not None:
        modulated = x.new_empty(x.shape)
        stats = x.new_empty((2, batch, length), dtype=torch.float32)
        mean, rstd = stats
    if not x.numel():
        return residual, modulated, stats
    x, y, gate, shift, scale = (_rows(t) for t in (x, y, gate, shift, scale))
    config = triton_forward(width)
    with _device_of(x):
        forward_kernel[(batch * length,)](
            x,
            y,
            gate,
            shift,
            scale,
            index,
            residual,
            modulated,
            mean,
            rstd,
            length,
            *_strides(x, y, gate, shift, scale, index),
            eps,
            E=width,
            BLOCK_E=config.block,
            num_warps=config.num_warps,
        )
    return residual, modulated, stats


def backward(
    dmodulated: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    dresidual: Tensor | None = None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dshift, dscale, dy and dgate; stats as forward returned them."""
    x = dresidual if residual is None else residual
    vectors = gate if scale is None else scale
    assert x is not None and vectors is not None
    batch, length, width = x.shape
    new_vectors = vectors.new_empty if x.numel() else vectors.new_zeros
    dx = None if scale is None else x.new_empty(x.shape)
    dshift, dscale = (None if scale is None else new_vectors(scale.shape) for _ in range(2))
    dy = None if y_dtype is None else x.new_empty(x.shape, dtype=y_dtype)
    dgate = None if y is None else new_vectors(vectors.shape)
    if not x.numel():
        return dx, dshift, dscale, dy, dgate
    mean, rstd = (None, None) if stats is None else stats
    num_vectors = 1 if index is None else vectors.shape[1]
    rows = gpu_rows_per_chunk(length, num_vectors)
    num_chunks = triton.cdiv(length, rows)
    num_sums = 2 * (scale is not None) + (y is not None)
    # A chunk adds to the sums of the vectors that it meets, and leaves those of the others at zero.
    new_partials = x.new_empty if index is None else x.new_zeros
    sizes = (batch, num_chunks, num_sums, num_vectors, width)
    partials = new_partials(sizes, dtype=torch.float32) if num_sums else None
    grads = (_rows(dresidual), _rows(dmodulated))
    residual, y, gate, scale = (_rows(t) for t in (residual, y, gate, scale))
    config = triton_backward(width, both=scale is not None and gate is not None)
    with _device_of(x):
        backward_kernel[(batch * num_chunks,)](
            *grads,
            residual,
            y,
            gate,
            scale,
            index,
            None if mean is None else mean.contiguous(),
            None if rstd is None else rstd.contiguous(),
            dx,
            dy,
            partials,
            length,
            num_chunks,
            rows,
            num_vectors,
            *_strides(*grads, residual, y, gate, scale, index),
            E=width,
            BLOCK_E=config.block,
            num_warps=config.num_warps,
        )
        if partials is not None:
            columns = num_vectors * width
            reduce_kernel[(batch * triton.cdiv(columns, _REDUCE_BLOCK),)](
                partials,
                dshift,
                dscale,
                dgate,
                num_chunks,
                columns,
                BLOCK_CHUNKS=_REDUCE_CHUNKS,
                BLOCK_E=_REDUCE_BLOCK,
                num_warps=4,
            )
    return dx, dshift, dscale, dy, dgate


def _rows(t: Tensor | None) -> Tensor | None:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Two for each: of rows (b, l), of vectors (b, m), of an index (b, l); zeros for None."""
    steps: list[int] = []
    for t in tensors:
        if t is None:
            steps += (0, 0)
        elif t.dim() == 2 and t.is_floating_point():
            steps += (t.stride(0), 0)
        else:
            steps += t.stride()[:2]
    return steps


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
