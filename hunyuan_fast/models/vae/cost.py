"""What passes over the VAE's layers take: bytes and multiplications, from shapes alone."""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch

from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, Layer, Size, layers_of, sizes_of

# Blocks of the norms, small tensors, what the convolution library and the allocator keep for
# themselves.
LIBRARY = 96 << 20
# Below this the CPU stacks the taps of a 3D convolution and runs it in 2D.
_STACKED = 20480


class Ledger:
    """Bytes and multiplications of one clip (C, T, H, W) on its way through one half of the VAE.

    Point p lies before layer p; the last one is the result. Where the layer before a point opens a
    residual block, storing the point means storing two maps: what comes out of that layer, and what
    went into it, for the sum.
    """

    def __init__(self, config: VAEConfig, half: Half, size: Size, dtype: torch.dtype) -> None:
        self.layers: tuple[Layer, ...] = layers_of(config, half)
        self.sizes = sizes_of(self.layers, size)
        self.item = dtype.itemsize
        channels = [self.layers[0].inputs, *(layer.outputs for layer in self.layers)]
        self.frame_bytes = [
            c * h * w * self.item for c, (_, h, w) in zip(channels, self.sizes, strict=True)
        ]

    @property
    def last(self) -> int:
        """The point of the result."""
        return len(self.layers)

    def frames(self, point: int) -> int:
        """Frames of the map at a point."""
        return self.sizes[point][0]

    def map_bytes(self, point: int) -> int:
        """Bytes of the map at a point."""
        return self.frames(point) * self.frame_bytes[point]

    def inside(self, point: int) -> bool:
        """Whether the point lies within a residual block."""
        return point > 0 and self.layers[point - 1].opens

    @cached_property
    def flops(self) -> list[float]:
        """Additions and multiplications of every layer over the whole clip."""
        return [self._flops(n) for n in range(self.last)]

    def _flops(self, index: int) -> float:
        layer, values = self.layers[index], prod(self.sizes[index + 1]) * 2.0
        if layer.attends:
            frames, height, width = self.sizes[index]
            pairs = frames * (frames + 1) / 2 * (height * width) ** 2
            return 4 * values * layer.inputs**2 + 4 * pairs * layer.inputs
        # of the three taps along a doubled axis two are added up beforehand
        taps = prod(2 if f == 2 else layer.kernel for f in layer.factor)
        shortcut = self.layers[index - 1].inputs if layer.shortcut else 0
        return values * layer.outputs * (taps * layer.inputs + shortcut)

    def work(self, start: int, length: int, *, given: bool) -> list[int]:
        """Bytes in use beside stored maps while chunks of `length` frames go from `start` on.

        One entry for every point after `start`; the attention is a way of its own, so the list ends
        with it. given: the chunks are read from the caller's tensor.
        """
        if self.layers[start].attends:
            return [self._attention(start, length)]
        frames = min(length, self.frames(start))
        width = frames * self.frame_bytes[start]
        skip = frames * self.frame_bytes[start - 1] if self.inside(start) else 0
        # stored frames of a chunk live beside their copy until it is complete
        peak = (width + skip) * (2 if frames > 1 or given else 1)
        states = held = 0
        found = []
        for index in range(start, self.last):
            layer = self.layers[index]
            if layer.attends:
                break
            made = self._made(layer, frames, self.frames(index + 1))
            step, state = self._step(index, frames, made, skip)
            peak, states = max(peak, held + step), states + state
            skip = frames * self.frame_bytes[index] if layer.opens else 0
            width = made * self.frame_bytes[index + 1]
            if made > length:
                held, made = held + width, length
            frames = made
            arrived = held + frames * self.frame_bytes[index + 1] + skip
            peak = max(peak, arrived)
            found.append(peak + states + LIBRARY)
        return found

    @staticmethod
    def _made(layer: Layer, frames: int, most: int) -> int:
        """Frames that come out of a layer for one chunk, at most."""
        made = frames * layer.factor[0] if layer.upsamples else -(-frames // layer.stride[0])
        return min(made, most)

    def _step(self, index: int, frames: int, made: int, skip: int) -> tuple[int, int]:
        """Bytes at the busiest moment of one layer, and those it keeps between chunks."""
        layer = self.layers[index]
        value, result = self.frame_bytes[index], made * self.frame_bytes[index + 1]
        width = frames * value
        if layer.kernel == 1:
            return width + 2 * result, 0
        _, height, columns = self.sizes[index]
        past = 1 if layer.factor[0] == 2 else layer.kernel - 1
        edged = value * (height + 2) * (columns + 2) // (height * columns)
        padded = (frames + past) * edged
        weights = layer.inputs * layer.outputs * layer.kernel**3 * self.item
        rows = layer.inputs * (frames + past) * (height + 2)
        # the stack of taps, the library's copy of it and of the result, which is in another layout
        stacked = 6 * padded + result if rows <= _STACKED else 0
        if layer.upsamples:
            # the window of one parity, the sums of taps in fp32, the parities beside the result
            scratch = padded + 2 * result + 5 * max(weights, weights * 4 // self.item)
        else:
            scratch = result + 2 * weights
        if layer.opens:
            skip = width
        norm = 2 * width + (0 if layer.opens else skip) if layer.norm else 0
        convolution = skip + width + padded + past * value + stacked + scratch
        total = result * (3 if layer.shortcut else 1) + skip if layer.closes else 0
        return max(norm, convolution, total), past * value

    def _attention(self, index: int, length: int) -> int:
        """Keys and values of the whole map, and a chunk between its norm and its sum."""
        frames = min(length, self.frames(index))
        return 2 * self.map_bytes(index) + 8 * frames * self.frame_bytes[index] + LIBRARY
