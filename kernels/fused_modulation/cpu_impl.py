"""Gated residual sum and adaptive layer norm by the C++ kernels: AVX-512, AVX2 or plain."""

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.fused_modulation.config import MAX_VECTORS, rows_per_chunk

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENSE = torch.contiguous_format


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if not x.is_cpu:
        return f"x must be on the CPU, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
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
    residual = modulated = stats = None
    if gate is not None:
        residual = torch.empty_like(x, memory_format=_DENSE)
    if scale is not None:
        modulated = torch.empty_like(x, memory_format=_DENSE)
        stats = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device)
    if x.numel():
        _C.fused_modulation_forward_cpu(
            _rows(x),
            _rows(shift),
            _rows(scale),
            eps,
            _rows(y),
            _rows(gate),
            index,
            residual,
            modulated,
            stats,
            torch.get_num_threads(),
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
    dx = dshift = dscale = dy = dgate = partials = None
    batch, length, width = x.shape
    empty = not x.numel()
    new_vector = torch.zeros_like if empty else torch.empty_like
    if scale is not None:
        dx = torch.empty_like(x, memory_format=_DENSE)
        dshift = new_vector(vectors, memory_format=_DENSE)
        dscale = new_vector(vectors, memory_format=_DENSE)
    if y_dtype is not None:
        dy = torch.empty_like(x, dtype=y_dtype, memory_format=_DENSE)
    if y is not None:
        dgate = new_vector(vectors, memory_format=_DENSE)
    if empty:
        return dx, dshift, dscale, dy, dgate
    num_vectors = 1 if index is None else vectors.shape[1]
    rows = rows_per_chunk(length, num_vectors)
    num_sums = 2 * (scale is not None) + (y is not None)
    if num_sums:
        sizes = (batch, -(-length // rows), num_sums, num_vectors, width)
        partials = torch.empty(sizes, dtype=torch.float32, device=x.device)
    _C.fused_modulation_backward_cpu(
        _rows(dmodulated),
        _rows(residual),
        _rows(scale),
        None if stats is None else stats.contiguous(),
        _rows(dresidual),
        _rows(y),
        _rows(gate),
        index,
        partials,
        rows,
        dx,
        dshift,
        dscale,
        dy,
        dgate,
        torch.get_num_threads(),
    )
    return dx, dshift, dscale, dy, dgate


def _rows(t: Tensor | None) -> Tensor | None:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    if t is None or t.is_contiguous() or t.stride(-1) == 1:
        return t
    return t.contiguous()
