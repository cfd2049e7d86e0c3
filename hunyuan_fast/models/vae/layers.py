"""Both halves of the VAE as flat lists of layers: what a clip meets, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from hunyuan_fast.models.vae.config import VAEConfig

Half = Literal["encode", "decode"]
Size = tuple[int, int, int]
Rows = tuple[int, int]  # from the first one to that behind the last
_ONE = (1, 1, 1)


@dataclass(frozen=True)
class Layer:
    """One convolution with the norm before it and the sum behind it, or the attention.

    conv, norm, shortcut: names of modules, None where there is no norm or no convolved shortcut.
    inputs, outputs: channels; kernel: taps along each axis.
    stride: of a convolution; factor: of an upsampling one.
    opens: the input is also what the next layer adds to its result, which `closes` says of it.
    """

    conv: str
    inputs: int
    outputs: int
    kernel: int = 3
    norm: str | None = None
    shortcut: str | None = None
    stride: Size = _ONE
    factor: Size = _ONE
    opens: bool = False
    closes: bool = False
    attends: bool = False

    @property
    def upsamples(self) -> bool:
        """Whether pixels are repeated before the convolution."""
        return self.factor != _ONE

    def size(self, size: Size) -> Size:
        """(T, H, W) of the result for an input of this size."""
        frames, *area = size
        if self.upsamples:
            frames = 1 + (frames - 1) * self.factor[0]
            height, width = (n * f for n, f in zip(area, self.factor[1:], strict=True))
        else:
            frames = (frames - 1) // self.stride[0] + 1
            height, width = ((n - 1) // s + 1 for n, s in zip(area, self.stride[1:], strict=True))
        return frames, height, width

    def reads(self, rows: Rows, height: int) -> Rows:
        """Rows of an input of `height` that make rows of the result; they begin with a stride."""
        factor, stride, reach = self.factor[1], self.stride[1], self.kernel // 2
        first = (rows[0] * stride - reach) // factor // stride * stride
        stop = ((rows[1] - 1) * stride + reach) // factor + 1
        return max(first, 0), min(stop, height)

    def makes(self, rows: Rows) -> Rows:
        """Rows of the result that come of rows of the input which begin with a stride."""
        factor, stride = self.factor[1], self.stride[1]
        return rows[0] * factor // stride, -(-rows[1] * factor // stride)


def layers_of(config: VAEConfig, half: Half) -> tuple[Layer, ...]:
    """The layers that `encode` or `decode` sends a clip through, in order."""
    widths, latent = config.block_out_channels, config.latent_channels
    if half == "encode":
        first, name, ends = config.in_channels, "encoder", 2 * latent
        found = [Layer("encoder.conv_in.conv", first, widths[0])]
        found += _levels(config, "encoder.down_blocks", widths, config.layers_per_block)
        found += _middle(config, name, widths[-1])
    else:
        widths = widths[::-1]
        name, ends = "decoder", config.out_channels
        found = [
            Layer("post_quant_conv", latent, latent, kernel=1),
            Layer("decoder.conv_in.conv", latent, widths[0]),
            *_middle(config, name, widths[0]),
            *_levels(config, "decoder.up_blocks", widths, config.layers_per_block + 1),
        ]
    norm = f"{name}.conv_norm_out"
    found.append(Layer(f"{name}.conv_out.conv", widths[-1], ends, norm=norm))
    if half == "encode":
        found.append(Layer("quant_conv", ends, ends, kernel=1))
    return tuple(found)


def _resnet(name: str, inputs: int, outputs: int) -> list[Layer]:
    shortcut = f"{name}.conv_shortcut.conv" if inputs != outputs else None
    return [
        Layer(f"{name}.conv1.conv", inputs, outputs, norm=f"{name}.norm1", opens=True),
        Layer(
            f"{name}.conv2.conv",
            outputs,
            outputs,
            norm=f"{name}.norm2",
            shortcut=shortcut,
            closes=True,
        ),
    ]


def _middle(config: VAEConfig, half: str, width: int) -> list[Layer]:
    found = _resnet(f"{half}.mid_block.resnets.0", width, width)
    if config.mid_block_add_attention:
        name = f"{half}.mid_block.attentions.0"
        found.append(Layer(name, width, width, norm=f"{name}.group_norm", attends=True))
    return found + _resnet(f"{half}.mid_block.resnets.1", width, width)


def _levels(config: VAEConfig, name: str, widths: tuple[int, ...], count: int) -> list[Layer]:
    """The levels of one half: residual blocks, then a change of size unless there is none."""
    found, inputs = [], widths[0]
    up = name.endswith("up_blocks")
    for level, (outputs, change) in enumerate(zip(widths, config.strides, strict=True)):
        for index in range(count):
            found += _resnet(f"{name}.{level}.resnets.{index}", inputs, outputs)
            inputs = outputs
        if change != _ONE:
            resampler = f"{name}.{level}.{'up' if up else 'down'}samplers.0.conv.conv"
            stride, factor = (_ONE, change) if up else (change, _ONE)
            found.append(Layer(resampler, outputs, outputs, stride=stride, factor=factor))
    return found


def sizes_of(layers: tuple[Layer, ...], size: Size) -> list[Size]:
    """(T, H, W) of the input and after every layer."""
    sizes = [size]
    for layer in layers:
        sizes.append(layer.size(sizes[-1]))
    return sizes


def flops_of(layers: tuple[Layer, ...], sizes: list[Size]) -> list[float]:
    """Additions and multiplications of every layer over a whole clip, whose sizes are given."""
    return [_flops(layers, sizes, index) for index in range(len(layers))]


def _flops(layers: tuple[Layer, ...], sizes: list[Size], index: int) -> float:
    layer, values = layers[index], prod(sizes[index + 1]) * 2.0
    if layer.attends:
        frames, height, width = sizes[index]
        pairs = frames * (frames + 1) / 2 * (height * width) ** 2
        return 4 * values * layer.inputs**2 + 4 * pairs * layer.inputs
    # of the three taps along a doubled axis two are added up beforehand
    taps = prod(2 if f == 2 else layer.kernel for f in layer.factor)
    shortcut = layers[index - 1].inputs if layer.shortcut else 0
    return values * layer.outputs * (taps * layer.inputs + shortcut)
