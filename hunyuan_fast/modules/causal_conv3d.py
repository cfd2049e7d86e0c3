"""The 3D convolution of the VAE: symmetric in space, looking only backwards in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: tuple[int, int, int] = (1, 1, 1)
) -> Tensor:
    """Convolve with edge values repeated in space and the first frame repeated before time zero.

    x (B, C, T, H, W); weight (O, C, K, K, K) with K odd; bias (O,); stride in (t, h, w).
    Returns (B, O, (T-1)//st + 1, (H-1)//sh + 1, (W-1)//sw + 1) in x.dtype.
    Source: technical report, section 4.1 (CausalConv3D).
    """
    kernel = weight.shape[-1]
    if kernel == 1:
        return F.conv3d(x, weight, bias, stride)
    side = kernel // 2
    if x.shape[2] == 1:
        # every temporal tap sees the one frame there is, so the taps add up to a 2D kernel
        frame = F.pad(x[:, :, 0], (side, side, side, side), mode="replicate")
        return F.conv2d(frame, weight.sum(2), bias, stride[1:]).unsqueeze(2)
    padded = F.pad(x, (side, side, side, side, kernel - 1, 0), mode="replicate")
    return F.conv3d(padded, weight, bias, stride)


class CausalConv3d(nn.Module):
    """Parameters of one causal convolution; `conv.weight` and `conv.bias` are the checkpoint names.

    (B, in_channels, T, H, W) -> (B, out_channels, T', H', W'), see `causal_conv3d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.conv.stride
        return causal_conv3d(x, self.conv.weight, self.conv.bias, stride=(stride[0], stride[1], stride[2]))
