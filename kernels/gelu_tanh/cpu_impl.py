"""GELU in its tanh form by the C++ kernels: AVX-512, AVX2 or plain, chosen at run time."""

import torch
from torch import Tensor

from hunyuan_fast import _C

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIMS = 6  # kMaxDims in csrc/common/tensor_view.h


def supports(x: Tensor, left: Tensor | None = None, out: Tensor | None = None) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if not x.is_cpu:
        return f"x must be on the CPU, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    if x.dim() > _MAX_DIMS:
        return f"x must have at most {_MAX_DIMS} dimensions, it has {x.dim()}"
    return None


def forward(x: Tensor, left: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y (..., M), or [left, y] (B, L, E + M); ``out`` if it is given, written into."""
    if not x.numel():
        return _forward_empty(x, left, out)
    threads = torch.get_num_threads()
    if left is not None and left.shape[-1]:
        y = x.new_empty((*x.shape[:-1], left.shape[-1] + x.shape[-1]))
        _C.gelu_tanh_concat_cpu(_rows(left), _rows(x), y, threads)
        return y
    # a row may be strided in out, which the kernels do not know
    y = out if out is not None and out.stride(-1) == 1 else _new(x)
    _C.gelu_tanh_forward_cpu(_rows(x), y, y is not out, threads)
    return y if out is None or y is out else out.copy_(y)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx (..., M)."""
    dx = _new(x)
    if x.numel():
        _C.gelu_tanh_backward_cpu(_rows(dy), _rows(x), dx, torch.get_num_threads())
    return dx


def _forward_empty(x: Tensor, left: Tensor | None, out: Tensor | None) -> Tensor:
    if left is None:
        return _new(x) if out is None else out
    y = x.new_empty((*x.shape[:-1], left.shape[-1] + x.shape[-1]))
    y[..., : left.shape[-1]] = left
    return y


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()
