"""The arithmetic of the autoencoder, counted from the shapes of its layers.

Two counts. *Plain*: every layer as it is written, upsampled maps convolved with 27 taps, a single
frame padded in time, attention over all pairs of tokens with a mask. *Least*: what the same result
needs. Along a doubled axis two of the three taps of an upsampling layer meet the same value, and
are added up beforehand (the phase form: 8 or 12 taps of 27); with a single frame all three taps in
time meet it; and attention takes the pairs of tokens that see each other.
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
        self, channels: int, out_channels: int, size: Size, *, kernel: int = 3, frames: int
    ) -> None:
        """A convolution of a map of ``frames`` frames to one of ``size``."""
        products = 2 * channels * out_channels * volume(size)
        self.plain += products * kernel**3
        self.least += products * kernel**2 * (1 if frames == 1 else kernel)

    def upsample(self, channels: int, size: Size, factor: Size) -> Size:
        """Repeated pixels, convolved; returns the new size."""
        frames = size[0]
        grown = (1 + (frames - 1) * factor[0], size[1] * factor[1], size[2] * factor[2])
        products = 2 * channels * channels * volume(grown)
        self.plain += products * 27
        self.least += products * phase_taps(factor, frames)
        return grown

    def downsample(self, channels: int, size: Size, stride: Size) -> Size:
        """A convolution with a stride; returns the new size."""
        t, h, w = ((n - 1) // s + 1 for n, s in zip(size, stride, strict=True))
        self.conv(channels, channels, (t, h, w), frames=size[0])
        return t, h, w

    def resnets(self, channels: int, out_channels: int, size: Size, count: int) -> None:
        """Residual blocks, the first of which may change the number of channels."""
        if channels != out_channels:
            self.conv(channels, out_channels, size, kernel=1, frames=size[0])
        for index in range(count):
            incoming = channels if index == 0 else out_channels
            self.conv(incoming, out_channels, size, frames=size[0])
            self.conv(out_channels, out_channels, size, frames=size[0])

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


def phase_taps(factor: Size, frames: int) -> int:
    """Taps that an upsampled value takes: two along a doubled axis, one in time for one frame."""
    time = 1 if frames == 1 else 2 if factor[0] == 2 else 3
    return time * (2 if factor[1] == 2 else 3) * (2 if factor[2] == 2 else 3)


def decode_flops(config: VAEConfig, latent: Size) -> Flops:
    """Latents of this size to pixels, one sample."""
    flops, size, frames = Flops(), latent, latent[0]
    widths = config.block_out_channels[::-1]
    flops.conv(config.latent_channels, config.latent_channels, size, kernel=1, frames=frames)
    flops.conv(config.latent_channels, widths[0], size, frames=frames)
    flops.middle(widths[0], size, attention=config.mid_block_add_attention)
    for level, factor in enumerate(config.strides):
        incoming = widths[max(level - 1, 0)]
        flops.resnets(incoming, widths[level], size, config.layers_per_block + 1)
        if factor != (1, 1, 1):
            size = flops.upsample(widths[level], size, factor)
    flops.conv(widths[-1], config.out_channels, size, frames=size[0])
    return flops


def encode_flops(config: VAEConfig, video: Size) -> Flops:
    """Pixels of this size to the moments of latents, one sample."""
    flops, size = Flops(), video
    widths, moments = config.block_out_channels, 2 * config.latent_channels
    flops.conv(config.in_channels, widths[0], size, frames=size[0])
    for level, stride in enumerate(config.strides):
        incoming = widths[max(level - 1, 0)]
        flops.resnets(incoming, widths[level], size, config.layers_per_block)
        if stride != (1, 1, 1):
            size = flops.downsample(widths[level], size, stride)
    flops.middle(widths[-1], size, attention=config.mid_block_add_attention)
    flops.conv(widths[-1], moments, size, frames=size[0])
    flops.conv(moments, moments, size, kernel=1, frames=size[0])
    return flops
