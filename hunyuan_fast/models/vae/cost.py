"""What passes over the VAE's layers take: bytes and multiplications, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, Layer, Size, flops_of, layers_of, sizes_of
from hunyuan_fast.models.vae.strips import course, strips
from hunyuan_fast.models.vae.workspace import Call, fuses_norm, workspace

# Blocks of the norms, small tensors, what the allocator keeps for itself.
SLACK = 32 << 20


@dataclass(frozen=True)
class Work:
    """Bytes in use beside stored maps: at the busiest moment, and when a chunk is at its end."""

    busy: int
    arrived: int


@dataclass(frozen=True)
class Span:
    """Rows of the largest of several strips, at every point of a chain, and the work of them all.

    came, used: as for `strips.Course`; flops: additions and multiplications of all strips.
    """

    came: list[int]
    used: list[int]
    flops: float


class Ledger:
    """Bytes and multiplications of one clip (C, T, H, W) on its way through one half of the VAE.

    Point p lies before layer p; the last one is the result. Where the layer before a point opens a
    residual block, storing the point means storing two maps: what comes out of that layer, and what
    went into it, for the sum. answers: the implementation of the convolutions, whose memory counts.
    """

    def __init__(
        self, config: VAEConfig, half: Half, size: Size, dtype: torch.dtype, answers: str
    ) -> None:
        self.layers: tuple[Layer, ...] = layers_of(config, half)
        self.sizes = sizes_of(self.layers, size)
        self.item, self._answers = dtype.itemsize, answers
        channels = [self.layers[0].inputs, *(layer.outputs for layer in self.layers)]
        self.heights = [height for _, height, _ in self.sizes]
        self.row_bytes = [
            c * width * self.item for c, (_, _, width) in zip(channels, self.sizes, strict=True)
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
        return self.frames(point) * self.heights[point] * self.row_bytes[point]

    def inside(self, point: int) -> bool:
        """Whether the point lies within a residual block."""
        return point > 0 and self.layers[point - 1].opens

    @cached_property
    def flops(self) -> list[float]:
        """Additions and multiplications of every layer over the whole clip."""
        return flops_of(self.layers, self.sizes)

    def work(self, start: int, length: int, *, given: bool, rows: Span | None = None) -> list[Work]:
        """What chunks of `length` frames take that go from `start` to each of the points after it.

        The attention is a way of its own, so the list ends with it. given: the chunks are read from
        the caller's tensor; rows: those of a strip, then the list ends with the strip's last point.
        """
        if self.layers[start].attends:
            return [self._attention(start, length)]
        end = self.last if rows is None else start + len(rows.came) - 1
        came = self.heights[start : end + 1] if rows is None else rows.came
        used = came if rows is None else rows.used
        frames = min(length, self.frames(start))
        own = frames * self.row_bytes[start] * came[0]
        skip = frames * self.row_bytes[start - 1] * came[0] if self.inside(start) else 0
        # stored frames of a chunk live beside their copy until it is complete
        peak = (own + skip) * (2 if frames > 1 or given else 1)
        states = held = 0
        several, found = False, []
        for index in range(start, end):
            layer = self.layers[index]
            if layer.attends:
                break
            made = self._made(layer, frames, self.frames(index + 1))
            result = made * self.row_bytes[index + 1] * came[index - start + 1]
            step, state = self._step(index, frames, used[index - start], result, own, skip)
            several = several or self.frames(index) > length  # else there is no past
            peak, states = max(peak, held + step), states + (state if several else 0)
            skip = own if layer.opens else 0 if layer.closes else skip
            own = result
            if made > length:
                # pieces of it go on one by one, as views of the whole
                held, own, made = held + own, 0, length
            frames = made
            # one frame that is no view is what will be stored
            arrived = held + (own + skip if frames > 1 else 0)
            found.append(Work(peak + states + SLACK, arrived + states + SLACK))
        return found

    def whole(self, clips: int) -> int:
        """Bytes of so many clips that go through together, every map of them whole."""
        given = clips * self.map_bytes(0)
        # they enter in the dtype of the weights, wider than maps are under autocast, and stay
        held = given * max(4, self.item) // self.item
        peak, skip = held, 0
        if self.layers[0].kernel == 1:
            held += clips * self.map_bytes(1)  # the decoder's own input
        for index, layer in enumerate(self.layers):
            own, result = (clips * self.map_bytes(point) for point in (index, index + 1))
            if layer.attends:
                peak = max(peak, clips * self._attention_maps(index, self.frames(index)))
                continue
            size = self.frames(index), layer.kernel - 1, *self.sizes[index][1:], result, clips
            # the map before a norm waits for the result, unless the convolution applies the norm
            normed = own if layer.norm and not fuses_norm(self._answers) else 0
            work = workspace(Call(layer, self.item, *size), self._answers)
            peak = max(peak, own + skip + normed + result + work)
            if layer.shortcut:
                work = workspace(Call(self._shortcut(index), self.item, *size), self._answers)
                peak = max(peak, skip + 2 * result + work)
            skip = own if layer.opens else 0
        # moments are clamped into a new tensor; what comes in may be copied twice
        return SLACK + held + max(peak, 2 * result)

    def span(self, start: int, end: int, count: int) -> Span:
        """What `count` strips take on their way from start to end, halos and all."""
        layers, heights = self.layers[start:end], self.heights[start : end + 1]
        ways = [course(layers, heights, rows) for rows in strips(heights[-1], count)]
        came, used = (
            [[stop - first for first, stop in column] for column in zip(*parts, strict=True)]
            for parts in ([way.came for way in ways], [way.used for way in ways])
        )
        flops = 0.0
        for index, height, made in zip(range(start, end), heights[1:], came[1:], strict=True):
            flops += self.flops[index] * sum(made) / height
        return Span([max(n) for n in came], [max(n) for n in used], flops)

    @staticmethod
    def _made(layer: Layer, frames: int, most: int) -> int:
        """Frames that come out of a layer for one chunk, at most."""
        made = frames * layer.factor[0] if layer.upsamples else -(-frames // layer.stride[0])
        return min(made, most)

    def _step(
        self, index: int, frames: int, rows: int, result: int, own: int, skip: int
    ) -> tuple[int, int]:
        """Bytes at the busiest moment of one layer, and those it keeps between chunks.

        result: bytes that come out; own: those that are freed with the chunk, a view has none.
        """
        layer, frame = self.layers[index], self.row_bytes[index] * rows
        past = 0
        if layer.kernel > 1:
            past = 1 if layer.factor[0] == 2 else layer.kernel - 1
        peak, width = 0, frames * frame
        if layer.norm and not fuses_norm(self._answers):
            peak = own + width + skip
            # the input stays for the sum of the block that begins here
            skip, own = own if layer.opens else skip, width
        columns = self.sizes[index][2]
        if layer.shortcut:
            call = Call(self._shortcut(index), self.item, frames, 0, rows, columns, result)
            peak = max(peak, own + skip + result + workspace(call, self._answers))
            skip = result
        call = Call(layer, self.item, frames, past, rows, columns, result)
        convolution = own + skip + result + workspace(call, self._answers)
        # where time is halved the frames kept vary: those of before live beside the new ones
        changing = past * frame if layer.stride[0] > 1 else 0
        return max(peak, convolution + changing), past * frame

    def _shortcut(self, index: int) -> Layer:
        """The convolution beside the two of the block that ends with this layer."""
        return Layer("", self.layers[index - 1].inputs, self.layers[index].outputs, kernel=1)

    def _attention(self, index: int, length: int) -> Work:
        chunk = min(length, self.frames(index)) * self.map_bytes(index) // self.frames(index)
        arrived = 2 * self.map_bytes(index) + chunk
        return Work(self._attention_maps(index, length) + SLACK, arrived + SLACK)

    def _attention_maps(self, index: int, length: int) -> int:
        """Keys and values of the whole map, and a chunk between its norm and its sum."""
        chunk = min(length, self.frames(index)) * self.map_bytes(index) // self.frames(index)
        return 2 * self.map_bytes(index) + 8 * chunk
