"""Group norm with SiLU by the C++ kernels: AVX-512, AVX2 or plain, chosen at run time."""

import torch
from torch import Tensor

from hunyuan_fast import _C

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Tensor, *_: object) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if not x.is_cpu:
        return f"x must be on the CPU, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    return None


def statistics(x: Tensor, num_groups: int) -> Tensor:
    """Count, mean and sum of squared deviations of every sample and group, (3, B, G) float64."""
    stats = torch.empty((3, len(x), num_groups), dtype=torch.float64)
    if not x.numel():
        return stats.zero_()
    _C.group_norm_silu_statistics_cpu(_rows(x), stats, torch.get_num_threads())
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
    y = torch.empty_like(x, memory_format=torch.channels_last_3d)
    if not x.numel():
        return y, statistics(x, num_groups) if stats is None else None
    own = None
    if stats is None:
        own = torch.empty((3, len(x), num_groups), dtype=torch.float64)
    _C.group_norm_silu_forward_cpu(
        _rows(x),
        _vector(weight),
        _vector(bias),
        own if stats is None else stats.contiguous(),
        stats is not None,
        eps,
        silu,
        y.movedim(1, -1),
        torch.get_num_threads(),
    )
    return y, own


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, channels-last, and the gradients of weight and bias, (C,)."""
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d)
    if not x.numel():
        return dx, torch.zeros(len(weight)), torch.zeros(len(weight))
    dweight, dbias = torch.empty(len(weight)), torch.empty(len(weight))
    _C.group_norm_silu_backward_cpu(
        _rows(dy),
        _rows(x),
        _vector(weight),
        _vector(bias),
        stats.contiguous(),
        eps,
        silu,
        dx.movedim(1, -1),
        dweight,
        dbias,
        torch.get_num_threads(),
    )
    return dx, dweight, dbias


def _rows(x: Tensor) -> Tensor:
    """x as (B, T, H, W, C) with contiguous samples: a view of channels-last memory, or a copy."""
    rows = x.movedim(1, -1)
    return rows if len(x) and rows[0].is_contiguous() else rows.contiguous()


def _vector(weight: Tensor) -> Tensor:
    """The weight as the kernels read it: fp32, which is exact, and contiguous."""
    return weight.float().contiguous()
