"""Changing the size of a feature map of the VAE; the first frame never changes in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_fast.modules.causal_conv3d import CausalConv3d


class CausalDownsample(nn.Module):
    """A causal convolution with stride; T becomes (T-1)//st + 1, H and W are divided."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def upsample_nearest(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """Repeat pixels by factor (t, h, w), the first frame in space only: T becomes 1 + (T-1)*t."""
    time, height, width = (float(f) for f in factor)
    first = F.interpolate(x[:, :, 0], scale_factor=(height, width)).unsqueeze(2)
    if x.shape[2] == 1:
        return first
    return torch.cat([first, F.interpolate(x[:, :, 1:], scale_factor=(time, height, width))], dim=2)


class CausalUpsample(nn.Module):
    """Nearest-neighbour upsampling by factor (t, h, w), then a causal convolution."""

    def __init__(self, channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x, self.factor))
