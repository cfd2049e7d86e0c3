"""The 3D convolution of the VAE: symmetric in space, looking only backwards in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hunyuan_fast.modules.group_norm import GroupNormSiLU
from hunyuan_fast.ops import causal_conv3d, group_norm_silu_conv3d


class CausalConv3d(nn.Module):
    """Parameters of one causal convolution; `conv.weight` and `conv.bias` are the checkpoint names.

    (B, in_channels, T, H, W) -> (B, out_channels, T', H', W'), see `ops.causal_conv3d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: what the result is added to, like it; at inference in the same pass."""
        fused = None if torch.is_grad_enabled() else residual
        conv = self.conv
        y = causal_conv3d(x, conv.weight, conv.bias, stride=self.stride, residual=fused)
        return y if residual is None or fused is not None else residual + y


def normed_conv(
    norm: GroupNormSiLU, conv: CausalConv3d, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """conv(norm(x), residual), of which no more than x is kept for backward."""
    if not torch.is_grad_enabled():
        return conv(norm(x), residual)
    vectors, weights = (norm.weight, norm.bias), (conv.conv.weight, conv.conv.bias)
    y = group_norm_silu_conv3d(x, norm.num_groups, *vectors, *weights, eps=norm.eps)
    return y if residual is None else residual + y
