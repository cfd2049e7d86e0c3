"""Group normalisation of the VAE, alone and followed by SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """SiLU of the group norm of x; statistics over T, H, W and the group's channels together.

    x (B, C, T, H, W); weight, bias (C,). Returns the shape and dtype of x; statistics are fp32.
    """
    normed = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(normed, inplace=not torch.is_grad_enabled())


class GroupNormSiLU(nn.GroupNorm):
    """Group norm over (T, H, W) together, then SiLU. (B, C, T, H, W) -> same shape."""

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps)
