"""Layer norm and modulation in plain PyTorch: the specification of the other implementations."""

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """Arguments of a typical call."""
    x = torch.zeros(1, 64, 3072, dtype=torch.bfloat16, device=device)
    return x, x[:, 0], x[:, 1], 1e-6


def supports(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), and the mean and reciprocal standard deviation of every row (B, L)."""
    wide, shift, scale = (_wide(t) for t in (x, shift, scale))
    mean = wide.mean(-1)
    centred = wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * (1 + scale[:, None]) + shift[:, None]
    return y.to(x.dtype).contiguous(), mean, rstd


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, E), dshift and dscale (B, E); mean and rstd as forward returned them."""
    wide, gradient = _wide(x), _wide(dy)
    normed = (wide - mean[..., None]) * rstd[..., None]
    g = gradient * (1 + _wide(scale)[:, None])
    projected = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    dx = (projected * rstd[..., None]).to(x.dtype).contiguous()
    dshift, dscale = gradient.sum(1), (gradient * normed).sum(1)
    return dx, dshift.to(scale.dtype), dscale.to(scale.dtype)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
