"""Adaptive layer norm by the CUDA kernels: a block per row, 16-byte accesses."""

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.fused_modulation.config import (
    cuda_backward,
    cuda_forward,
    cuda_max_width,
    gpu_rows_per_chunk,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
) -> str | None:
    """None, or why the CUDA kernels cannot answer this call."""
    if gate is not None:
        return "the CUDA kernels normalise and modulate only; they take no gate"
    if index is not None:
        return "the CUDA kernels take one vector per sample and no index"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    width, widest = x.shape[-1], cuda_max_width(x.element_size())
    if width * x.element_size() % 16:
        return f"a row must be a multiple of 16 bytes, E is {width} of {x.dtype}"
    if width > widest:
        return f"the width E must be at most {widest} in {x.dtype}, it is {width}"
    if x.device.type != "cuda":
        return f"x must be on a CUDA device, it is on {x.device}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        return f"the GPU must be sm_80 or later, it is sm_{major}{minor}"
    return None


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    y: None = None,
    gate: None = None,
    index: None = None,
) -> tuple[None, Tensor, Tensor]:
    """No residual, modulated (B, L, E), and stats (2, B, L): mean and rstd of every row."""
    batch, length, width = x.shape
    modulated = x.new_empty(x.shape)
    stats = x.new_empty((2, batch, length), dtype=torch.float32)
    if not x.numel():
        return None, modulated, stats
    x, shift, scale = _rows(x), _vectors(shift, x), _vectors(scale, x)
    config = cuda_forward(width, x.element_size())
    with torch.cuda.device(x.device):
        _C.fused_modulation_forward_cuda(
            x, shift, scale, eps, modulated, stats, config.threads, config.vectors, _stream(x)
        )
    return None, modulated, stats


def backward(
    dmodulated: Tensor,
    residual: Tensor,
    scale: Tensor,
    stats: Tensor,
    dresidual: None = None,
    y: None = None,
    gate: None = None,
    index: None = None,
    y_dtype: None = None,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """dx, dshift and dscale; stats as forward returned them. No gradients of a gate half."""
    batch, length, width = residual.shape
    dx = residual.new_empty(residual.shape)
    if not residual.numel():
        dshift, dscale = (scale.new_zeros(scale.shape) for _ in range(2))
        return dx, dshift, dscale, None, None
    sums = [residual.new_empty((batch, width), dtype=torch.float32) for _ in range(2)]
    rows = gpu_rows_per_chunk(length)
    sizes = (batch, -(-length // rows), 2, 1, width)
    partials = residual.new_empty(sizes, dtype=torch.float32)
    config = cuda_backward(width, residual.element_size())
    with torch.cuda.device(residual.device):
        _C.fused_modulation_backward_cuda(
            _rows(dmodulated),
            _rows(residual),
            _vectors(scale, residual),
            stats.contiguous(),
            partials,
            rows,
            dx,
            *sums,
            config.threads,
            config.vectors,
            _stream(residual),
        )
    dshift, dscale = (total.to(scale.dtype) for total in sums)
    return dx, dshift, dscale, None, None


def _rows(t: Tensor) -> Tensor:
    """The tensor with contiguous rows that all start at multiples of 16 bytes."""
    steps = [step * t.element_size() for step in t.stride()[:-1]]
    aligned = t.stride(-1) == 1 and not any(at % 16 for at in (t.data_ptr(), *steps))
    return t if aligned else t.clone(memory_format=torch.contiguous_format)


def _vectors(t: Tensor, x: Tensor) -> Tensor:
    """shift or scale as the kernels read it: in the dtype of x, or in fp32, which is exact."""
    return _rows(t if t.dtype == x.dtype else t.float())


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream
