"""The convolutions that a clip meets in the autoencoder, each kind once."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from benchmarks.shapes import Clip
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, layers_of, sizes_of

Triple = tuple[int, int, int]
_ONES = (1, 1, 1)
# In and out of one call, in 16 bits: what the clip in chunks comes to within 80 GB.
_MOST_BYTES = 6 * 10**9
_LENGTHS = (17, 9, 5)


@dataclass(frozen=True)
class Convolution:
    """A convolution of the VAE: (T, H, W) of its input, and what it makes of it."""

    name: str
    size: Triple
    channels: int
    out_channels: int
    kernel: int = 3
    stride: Triple = _ONES
    factor: Triple | None = None

    @property
    def out_size(self) -> Triple:
        t, h, w = self.size
        if self.factor is not None:
            return 1 + (t - 1) * self.factor[0], h * self.factor[1], w * self.factor[2]
        st, sh, sw = self.stride
        return (t - 1) // st + 1, (h - 1) // sh + 1, (w - 1) // sw + 1

    @property
    def half_bytes(self) -> int:
        """Of its input and its result in 16 bits."""
        return 2 * (self.channels * prod(self.size) + self.out_channels * prod(self.out_size))


def convolutions(config: VAEConfig, clip: Clip, label: str) -> list[Convolution]:
    """Of the decoder, then what the encoder adds, all but those of a few channels to as many.

    label: the clip's, begins their names. A clip longer than a chunk is cut.
    """
    found: dict[tuple[object, ...], Convolution] = {}
    whole = {"decode": clip.latent, "encode": (clip.frames, clip.height, clip.width)}
    for half in ("decode", "encode"):
        for each in _of_half(config, half, whole[half], f"{label}-{half}"):
            kind = each.size[1:], each.channels, each.out_channels, each.kernel, each.stride
            found.setdefault((*kind, each.factor), each)
    return list(found.values())


def _of_half(config: VAEConfig, half: Half, size: Triple, label: str) -> Iterator[Convolution]:
    layers = layers_of(config, half)
    sizes = sizes_of(layers, size)
    for index, (layer, (frames, *area)) in enumerate(zip(layers, sizes[:-1], strict=True)):
        if layer.attends or (layer.kernel == 1 and layer.inputs == layer.outputs):
            continue
        made = [(layer.inputs, layer.kernel)]
        if layer.shortcut:
            made.append((layers[index - 1].inputs, 1))
        for inputs, kernel in made:
            for length in (min(frames, most) for most in _LENGTHS):
                whole = Convolution(
                    _name(label, inputs, layer.outputs, area, kernel, layer.stride, layer.factor),
                    (length, area[0], area[1]),
                    inputs,
                    layer.outputs,
                    kernel,
                    layer.stride,
                    layer.factor if layer.upsamples else None,
                )
                if whole.half_bytes <= _MOST_BYTES:
                    break
            yield whole


def _name(
    label: str,
    inputs: int,
    outputs: int,
    area: list[int],
    kernel: int,
    stride: Triple,
    factor: Triple,
) -> str:
    kind = "-shortcut" if kernel == 1 else ""
    for word, steps in (("down", stride), ("up", factor)):
        if steps != _ONES:
            kind = f"-{word}{''.join(map(str, steps))}"
    return f"{label}-{inputs}-{outputs}ch-{area[0]}x{area[1]}{kind}"
