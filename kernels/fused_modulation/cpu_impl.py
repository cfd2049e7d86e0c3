"""Layer norm and modulation by the C++ kernels: AVX-512, AVX2 or plain, chosen at run time."""

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.fused_modulation.config import rows_per_chunk

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if x.device.type != "cpu":
        return f"x must be on the CPU, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    return None


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E) and the mean and reciprocal standard deviation of every row (B, L)."""
    y = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel():
        x, shift, scale = _rows(x), _rows(shift.float()), _rows(scale.float())
        _C.fused_modulation_forward_cpu(
            x, shift, scale, eps, y, mean, rstd, torch.get_num_threads()
        )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, E), dshift and dscale (B, E)."""
    batch, length, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype)
    if not x.numel():
        return dx, *(scale.new_zeros(scale.shape) for _ in range(2))
    dshift, dscale = (torch.empty(batch, width, dtype=torch.float32) for _ in range(2))
    rows = rows_per_chunk(length)
    partials = torch.empty(batch, -(-length // rows), 2, width, dtype=torch.float32)
    _C.fused_modulation_backward_cpu(
        _rows(dy),
        _rows(x),
        _rows(scale.float()),
        mean.contiguous(),
        rstd.contiguous(),
        partials,
        rows,
        dx,
        dshift,
        dscale,
        torch.get_num_threads(),
    )
    return dx, dshift.to(scale.dtype), dscale.to(scale.dtype)


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()
