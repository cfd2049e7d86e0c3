"""What a plan says: which maps to store, and in which passes of chunks and strips to make them.

A segment leads from one stored map to the next. A group norm needs the statistics of its whole
input before it can be applied, so each norm on the way costs a pass over the segment up to it,
which stores nothing; the last pass makes the next map and collects the statistics of a norm right
behind it. Where memory allows the plain pass there are no segments: every map is there whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hunyuan_fast.models.vae.budget import show_bytes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, Size, layers_of

Shape = tuple[int, int, int, int, int]
# Called with the part of the planned arithmetic that is done, from above 0 to 1.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Pass:
    """All frames from the start of a segment to the point `stop`, `frames` at a time.

    strips: into how many the maps are cut in height; each goes through with all its frames.
    peak: bytes in use meanwhile, beyond the input and the weights; flops: of one clip.
    """

    stop: int
    frames: int
    strips: int
    peak: int
    flops: float


@dataclass(frozen=True)
class Segment:
    """From the stored map at `start` to that at `stop`: passes for norms, then the one that stores.

    stored: bytes of the map at `stop`, with what a residual block keeps beside it.
    """

    start: int
    stop: int
    passes: tuple[Pass, ...]
    stored: int


@dataclass(frozen=True)
class Plan:
    """What `encode` or `decode` will do with a batch of one shape, and what it takes.

    peak: bytes, an upper bound of all that is allocated beyond the input and the weights, the
        result included; with `offload` without stored maps, which wait in host memory: `parked`.
    together: clips that go through at once in the plain pass, as without a budget, which has no
        segments; 0: chunks of one clip after the other, segment by segment.
    flops: of the whole batch; least_flops: of one pass over the network.
    """

    half: Half
    config: VAEConfig
    shape: Shape
    result_shape: Shape
    dtype: torch.dtype
    budget: int
    offload: bool
    peak: int
    flops: float
    least_flops: float
    segments: tuple[Segment, ...] = ()
    together: int = 0
    parked: int = 0

    @property
    def extra(self) -> float:
        """How many times the arithmetic of one pass over the network."""
        return self.flops / self.least_flops

    @property
    def size(self) -> Size:
        """(T, H, W) of the input."""
        return self.shape[2], self.shape[3], self.shape[4]

    def __str__(self) -> str:
        return self.summary() if self.together else f"{self.summary()}\n{self.table()}"

    def summary(self) -> str:
        """Peak, budget, number of stored maps and extra arithmetic, in one line."""
        shape = " x ".join(map(str, self.shape))
        head = (
            f"{self.half} {shape} in {str(self.dtype).removeprefix('torch.')}: peak "
            f"{show_bytes(self.peak)} of {show_bytes(self.budget)}"
        )
        if self.together:
            clips = "" if self.together == self.shape[0] else ", one clip after the other"
            return f"{head}, whole maps, as without a budget{clips}"
        steps = [step for segment in self.segments for step in segment.passes]
        length, most = _range([step.frames for step in steps]), max(s.strips for s in steps)
        strips = f" in up to {most} strips" if most > 1 else ""
        parked = f", {show_bytes(self.parked)} parked in host memory" if self.offload else ""
        return (
            f"{head}{parked}, {length} frames at a time{strips}, {self.extra:.2f} times the "
            "arithmetic"
        )

    def table(self) -> str:
        """One line for each segment; the plain pass has none."""
        layers = layers_of(self.config, self.half)
        rows = [("stored map made by", "passes", "strips", "frames", "stored", "peak", "TFLOP")]
        for segment in self.segments:
            lengths = [step.frames for step in segment.passes]
            counts = [step.strips for step in segment.passes]
            rows.append(
                (
                    layers[segment.stop - 1].conv.removesuffix(".conv"),
                    str(len(lengths)),
                    _range(counts),
                    _range(lengths),
                    show_bytes(segment.stored),
                    show_bytes(max(step.peak for step in segment.passes)),
                    f"{sum(step.flops for step in segment.passes) / 1e12:.3f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0])]
                + [word.rjust(n) for word, n in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        )


def _range(numbers: list[int]) -> str:
    return "-".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))
