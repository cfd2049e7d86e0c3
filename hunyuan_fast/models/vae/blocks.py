"""The parts of the VAE: residual block, mid block, one encoder level, one decoder level."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hunyuan_fast.modules.causal_conv3d import CausalConv3d, normed_conv
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.modules.group_norm import GroupNormSiLU
from hunyuan_fast.modules.resample import CausalDownsample, CausalUpsample

Stride = tuple[int, int, int]
# How to call a block: as it is, or in a way that keeps less for backward.
Run = Callable[[nn.Module, Tensor], Tensor]


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    """Call a block as it is."""
    y: Tensor = block(x)
    return y


class ResnetBlock(nn.Module):
    """Two normalised causal convolutions around a residual: (B, C, T, H, W) -> (B, C', T, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = normed_conv(self.norm1, self.conv1, x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return normed_conv(self.norm2, self.conv2, hidden, shortcut)


class MidBlock(nn.Module):
    """Residual block, frame-causal attention, residual block, at the smallest size."""

    def __init__(self, channels: int, num_groups: int, *, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, num_groups) for _ in range(2)]
        )
        self.attentions = nn.ModuleList(
            [FrameCausalAttention(channels, num_groups)] if add_attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


def _resnets(in_channels: int, out_channels: int, count: int, num_groups: int) -> nn.ModuleList:
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nn.ModuleList([ResnetBlock(channels, out_channels, num_groups) for channels in inputs])


class DownBlock(nn.Module):
    """One encoder level: residual blocks, then a strided convolution unless the stride is one."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, num_groups: int, stride: Stride
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, num_groups)
        self.downsamplers = nn.ModuleList(
            [CausalDownsample(out_channels, stride)] if stride != (1, 1, 1) else []
        )

    def forward(self, x: Tensor, run: Run = plainly) -> Tensor:
        """run: how to call a residual block; a change of size keeps nothing but its input."""
        for resnet in self.resnets:
            x = run(resnet, x)
        for resampler in self.downsamplers:
            x = resampler(x)
        return x


class UpBlock(nn.Module):
    """One decoder level: residual blocks, then upsampling unless the factor is one."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, num_groups: int, factor: Stride
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, num_groups)
        self.upsamplers = nn.ModuleList(
            [CausalUpsample(out_channels, factor)] if factor != (1, 1, 1) else []
        )

    def forward(self, x: Tensor, run: Run = plainly) -> Tensor:
        """run: how to call a residual block; a change of size keeps nothing but its input."""
        for resnet in self.resnets:
            x = run(resnet, x)
        for resampler in self.upsamplers:
            x = resampler(x)
        return x
