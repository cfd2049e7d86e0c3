"""The 3D convolution of the VAE: symmetric in space, looking only backwards in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hunyuan_fast.modules.group_norm import GroupNormSiLU
from hunyuan_fast.ops import causal_conv3d, group_norm_silu_conv3d
from hunyuan_fast.ops.causal_conv3d import fuses_norm


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

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: GroupNormSiLU | None = None
    ) -> Tensor:
        """norm: comes before; its result is kept neither for backward nor, at inference, made where
        the convolution can apply it on its way.

        residual: what the result is added to, like it; at inference in the same pass.
        """
        if torch.is_grad_enabled():
            y = self.as_recorded(x, norm)
            return y if residual is None else residual + y
        conv, scale, shift = self.conv, None, None
        if norm is not None:
            if fuses_norm(x, conv.weight):
                scale, shift = norm.scale_and_shift(x)
            else:
                x = norm(x)
        return causal_conv3d(
            x,
            conv.weight,
            conv.bias,
            stride=self.stride,
            scale=scale,
            shift=shift,
            residual=residual,
        )

    def as_recorded(self, x: Tensor, norm: GroupNormSiLU | None) -> Tensor:
        """The bits that x and its norm give while gradients are recorded."""
        weights = self.conv.weight, self.conv.bias
        if norm is None:
            return causal_conv3d(x, *weights, stride=self.stride)
        if self.stride != (1, 1, 1):
            return causal_conv3d(norm(x), *weights, stride=self.stride)
        vectors = norm.weight, norm.bias
        return group_norm_silu_conv3d(x, norm.num_groups, *vectors, *weights, eps=norm.eps)
