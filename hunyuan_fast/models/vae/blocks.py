"""The parts of the VAE: residual block, mid block, one encoder level, one decoder level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import cast

from torch import Tensor, nn

from hunyuan_fast.models.vae.again import made_again
from hunyuan_fast.modules.causal_conv3d import CausalConv3d
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.modules.group_norm import GroupNormSiLU
from hunyuan_fast.modules.resample import CausalDownsample, CausalUpsample

Stride = tuple[int, int, int]
# How to call a layer: as it is, or in a way that keeps less for backward.
Run = Callable[[nn.Module, Tensor], Tensor]


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer as it is."""
    y: Tensor = layer(x)
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

    def forward(self, x: Tensor, *, again: bool = False) -> Tensor:
        """again: keep x alone for backward, which makes the map between the convolutions again."""
        hidden = self.conv1(x, norm=self.norm1)
        with made_again(hidden, self._between, x) if again else nullcontext():
            if self.conv_shortcut is None:
                return self.conv2(hidden, x, norm=self.norm2)
            hidden = self.conv2(hidden, norm=self.norm2)
            return self.conv_shortcut(x, hidden)

    def _between(self, x: Tensor) -> Tensor:
        return self.conv1.as_recorded(x, self.norm1)


class _Level(nn.Module):
    """Layers that a map passes one after the other, (B, C, T, H, W) -> (B, C', T', H', W')."""

    def layers(self) -> Iterator[nn.Module]:
        """In order, which is that of the lists that hold them."""
        for part in self.children():
            yield from cast(nn.ModuleList, part)

    def forward(self, x: Tensor) -> Tensor:
        return through(self.layers(), x)


def through(layers: Iterable[nn.Module], x: Tensor, run: Run = plainly) -> Tensor:
    """The map behind all layers.

    run: how to call one, but for those that change sizes: they keep no more than their input.

    One loop over the layers of all levels takes less memory than a level after the other: whoever
    calls a level keeps its input, which may be the largest map of all, until the level is through.
    """
    for layer in layers:
        x = layer(x) if isinstance(layer, CausalDownsample | CausalUpsample) else run(layer, x)
    return x


class MidBlock(_Level):
    """Residual block, frame-causal attention, residual block, at the smallest size."""

    def __init__(self, channels: int, num_groups: int, *, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, num_groups) for _ in range(2)]
        )
        self.attentions = nn.ModuleList(
            [FrameCausalAttention(channels, num_groups)] if add_attention else []
        )

    def layers(self) -> Iterator[nn.Module]:
        """In order."""
        first, last = self.resnets
        yield from (first, *self.attentions, last)


def _resnets(in_channels: int, out_channels: int, count: int, num_groups: int) -> nn.ModuleList:
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nn.ModuleList([ResnetBlock(channels, out_channels, num_groups) for channels in inputs])


class DownBlock(_Level):
    """One encoder level: residual blocks, then a strided convolution unless the stride is one."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, num_groups: int, stride: Stride
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, num_groups)
        self.downsamplers = nn.ModuleList(
            [CausalDownsample(out_channels, stride)] if stride != (1, 1, 1) else []
        )


class UpBlock(_Level):
    """One decoder level: residual blocks, then upsampling unless the factor is one."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, num_groups: int, factor: Stride
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, num_groups)
        self.upsamplers = nn.ModuleList(
            [CausalUpsample(out_channels, factor)] if factor != (1, 1, 1) else []
        )
