"""Changing the size of a feature map of the VAE; the first frame stands alone in time."""

from __future__ import annotations

from torch import Tensor, nn

from hunyuan_fast.modules.causal_conv3d import CausalConv3d
from hunyuan_fast.ops import upsample_causal_conv3d

Factor = tuple[int, int, int]


class CausalDownsample(nn.Module):
    """A causal convolution with stride; T becomes (T-1)//st + 1, H and W are divided."""

    def __init__(self, channels: int, stride: Factor) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CausalUpsample(nn.Module):
    """Upsampling and a causal convolution in one, see `ops.upsample_causal_conv3d`."""

    def __init__(self, channels: int, factor: Factor) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv.conv
        return upsample_causal_conv3d(x, conv.weight, conv.bias, factor=self.factor)
