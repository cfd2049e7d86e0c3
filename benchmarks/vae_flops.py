"""The arithmetic of the autoencoder, counted from the shapes of its layers.

Two counts. *Plain*: every layer as it is written, upsampled maps convolved with 27 taps, a single
frame padded in time, attention over all pairs of tokens with a mask. *Least*: what the same result
needs. Along a doubled axis two of the three taps of an upsampling layer meet the same value, and
are added up beforehand (the phase form: 8 or 12 taps of 27); so are the taps in time of the first
frames that meet the first frame; and attention takes the pairs of tokens that see each other.
"""

from dataclasses import dataclass

from hunyuan_fast.models.vae.config import VAEConfig

Size = tuple[int, int, int]


@dataclass
class Flops:
    """A multiplication and an addition count two."""

    plain: int = 0
    least: int = 0

    def conv(
        self, channels: int, out_channels: int, size: Size, *, kernel: int = 3, stride: int = 1
    ) -> None:
        """A convolution to a map of ``size``; stride: in time."""
        frames, *area = size
        products = 2 * channels * out_channels * kernel**2 * area[0] * area[1]
        self.plain += products * kernel * frames
        self.least += products * frames_seen(frames, kernel, stride=stride)

    def upsample(self, channels: int, size: Size, factor: Size) -> Size:
        """Repeated pixels, convolved; returns the new size."""
        frames = size[0]
        grown = (1 + (frames - 1) * factor[0], size[1] * factor[1], size[2] * factor[2])
        products = 2 * channels * channels * grown[1] * grown[2]
        self.plain += products * 27 * grown[0]
        taps = (2 if factor[1] == 2 else 3) * (2 if factor[2] == 2 else 3)
        self.least += products * taps * frames_seen(grown[0], 3, factor=factor[0])
        return grown

    def downsample(self, channels: int, size: Size, stride: Size) -> Size:
        """A convolution with a stride; returns the new size."""
        t, h, w = ((n - 1) // s + 1 for n, s in zip(size, stride, strict=True))
        self.conv(channels, channels, (t, h, w), stride=stride[0])
        return t, h, w

    def resnets(self, channels: int, out_channels: int, size: Size, count: int) -> None:
        """Residual blocks, the first of which may change the number of channels."""
        if channels != out_channels:
            self.conv(channels, out_channels, size, kernel=1)
        for index in range(count):
            incoming = channels if index == 0 else out_channels
            self.conv(incoming, out_channels, size)
            self.conv(out_channels, out_channels, size)

    def middle(self, channels: int, size: Size, *, attention: bool) -> None:
        """Two residual blocks, and four linear layers and two products of attention."""
        self.resnets(channels, channels, size, 2)
        if attention:
            frames, tokens = size[0], volume(size)
            per_frame = tokens // frames
            pairs = per_frame * per_frame * frames * (frames + 1) // 2
            linear = 2 * 4 * channels * channels * tokens
            self.plain += linear + 2 * 2 * channels * tokens * tokens
            self.least += linear + 2 * 2 * channels * pairs


def volume(size: Size) -> int:
    """Places in a map."""
    t, h, w = size
    return t * h * w


def frames_seen(frames: int, kernel: int, *, stride: int = 1, factor: int = 1) -> int:
    """Frames of the input that each of ``frames`` outputs sees, added up.

    factor: how many times each frame but the first was repeated before; not with a stride.
    """

    def source(index: int) -> int:
        return -(-max(index, 0) // factor)

    lasts = range(0, frames * stride, stride)
    return sum(source(last) - source(last - kernel + 1) + 1 for last in lasts)


def decode_flops(config: VAEConfig, latent: Size) -> Flops:
    """Latents of this size to pixels, one sample."""
    flops, size = Flops(), latent
    widths = config.block_out_channels[::-1]
    flops.conv(config.latent_channels, config.latent_channels, size, kernel=1)
    flops.conv(config.latent_channels, widths[0], size)
    flops.middle(widths[0], size, attention=config.mid_block_add_attention)
    for level, factor in enumerate(config.strides):
        incoming = widths[max(level - 1, 0)]
        flops.resnets(incoming, widths[level], size, config.layers_per_block + 1)
        if factor != (1, 1, 1):
            size = flops.upsample(widths[level], size, factor)
    flops.conv(widths[-1], config.out_channels, size)
    return flops


def encode_flops(config: VAEConfig, video: Size) -> Flops:
    """Pixels of this size to the moments of latents, one sample."""
    flops, size = Flops(), video
    widths, moments = config.block_out_channels, 2 * config.latent_channels
    flops.conv(config.in_channels, widths[0], size)
    for level, stride in enumerate(config.strides):
        incoming = widths[max(level - 1, 0)]
        flops.resnets(incoming, widths[level], size, config.layers_per_block)
        if stride != (1, 1, 1):
            size = flops.downsample(widths[level], size, stride)
    flops.middle(widths[-1], size, attention=config.mid_block_add_attention)
    flops.conv(widths[-1], moments, size)
    flops.conv(moments, moments, size, kernel=1)
    return flops
