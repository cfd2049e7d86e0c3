"""How to encode or decode a clip within so much memory: which maps to store, how long chunks are.

A plan is a pure function of shapes, dtype and device. A segment leads from one stored map to the
next. A group norm needs the statistics of its whole input before it can be applied, so each norm on
the way costs a pass over the segment up to it, which stores nothing; the last pass makes the next
map and collects the statistics of a norm right behind it. Storing every map costs no arithmetic,
storing few costs passes: of all ways that fit, a plan takes the one with the least arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from hunyuan_fast.models.vae.budget import show_bytes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.cost import Ledger, Work
from hunyuan_fast.models.vae.layers import Half, Size, layers_of
from hunyuan_fast.models.vae.workspace import answering

Shape = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Pass:
    """All frames from the start of a segment to the point `stop`, `frames` at a time.

    peak: bytes in use meanwhile, beyond the input and the weights; flops: of one clip.
    """

    stop: int
    frames: int
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
    flops: of the whole batch; extra: how many times the arithmetic of one pass over the network.
    """

    half: Half
    config: VAEConfig
    shape: Shape
    result_shape: Shape
    dtype: torch.dtype
    budget: int
    offload: bool
    segments: tuple[Segment, ...]
    peak: int
    parked: int
    flops: float
    extra: float

    @property
    def size(self) -> Size:
        """(T, H, W) of the input."""
        return self.shape[2], self.shape[3], self.shape[4]

    def __str__(self) -> str:
        return f"{self.summary()}\n{self.table()}"

    def summary(self) -> str:
        """Peak, budget, number of stored maps and extra arithmetic, in one line."""
        shape = " x ".join(map(str, self.shape))
        chunks = sorted({step.frames for segment in self.segments for step in segment.passes})
        length = "-".join(map(str, dict.fromkeys((chunks[0], chunks[-1]))))
        parked = f", {show_bytes(self.parked)} parked in host memory" if self.offload else ""
        return (
            f"{self.half} {shape} in {str(self.dtype).removeprefix('torch.')}: peak "
            f"{show_bytes(self.peak)} of {show_bytes(self.budget)}{parked}, {length} frames at a "
            f"time, {self.extra:.2f} times the arithmetic"
        )

    def table(self) -> str:
        """One line for each segment."""
        layers = layers_of(self.config, self.half)
        rows = [("stored map made by", "passes", "frames", "stored", "peak", "TFLOP")]
        for segment in self.segments:
            lengths = [step.frames for step in segment.passes]
            rows.append(
                (
                    layers[segment.stop - 1].conv.removesuffix(".conv"),
                    str(len(lengths)),
                    "-".join(map(str, dict.fromkeys((min(lengths), max(lengths))))),
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


def plan_decode(
    config: VAEConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    budget: int,
    *,
    offload: bool = False,
    device: torch.device | str = "cpu",
) -> Plan:
    """How `decode` takes latents (B, latent_channels, T, H, W) within `budget` bytes.

    dtype: of the maps; offload: stored maps wait in host memory, which no budget bounds; device:
        where it will run, since who answers a convolution there and how much it takes depends.
    Raises ValueError naming the least budget that works when this one does not.
    """
    return _Planner(config, "decode", shape, dtype, offload, device).plan(budget)


def plan_encode(
    config: VAEConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    budget: int,
    *,
    offload: bool = False,
    device: torch.device | str = "cpu",
) -> Plan:
    """How `encode` takes a clip (B, in_channels, T, H, W); the rest as for `plan_decode`."""
    return _Planner(config, "encode", shape, dtype, offload, device).plan(budget)


def least_budget(
    half: Half,
    config: VAEConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    offload: bool = False,
    device: torch.device | str = "cpu",
) -> int:
    """The least bytes within which `encode` or `decode` can work; arguments as `plan_decode`."""
    return _Planner(config, half, shape, dtype, offload, device).least()


class _Planner:
    """The choice of stored maps, by dynamic programming over the points between layers."""

    def __init__(
        self,
        config: VAEConfig,
        half: Half,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        offload: bool,
        device: torch.device | str,
    ) -> None:
        batch, channels, frames, height, width = shape
        self.config, self.half, self.dtype, self.offload = config, half, dtype, offload
        self.shape: Shape = (batch, channels, frames, height, width)
        answers = answering(dtype, torch.device(device))
        self.ledger = Ledger(config, half, (frames, height, width), dtype, answers)
        self.result = batch * self.ledger.map_bytes(self.ledger.last)
        self._work: dict[tuple[int, int], list[Work]] = {}
        # finite values are looked for before anything else: two maps of flags, one of magnitudes
        values = batch * channels * frames * height * width
        self.entry = values * (dtype.itemsize + 2) if half == "decode" else 0

    def plan(self, budget: int) -> Plan:
        if not isinstance(budget, int) or isinstance(budget, bool):
            raise TypeError(f"budget must be a number of bytes, got {type(budget).__name__}")
        least = self.least()
        if budget < least:
            raise ValueError(
                f"memory_budget must be at least {show_bytes(least, up=True)} to {self.half} "
                f"{' x '.join(map(str, self.shape))} in {str(self.dtype).removeprefix('torch.')}, "
                f"got {show_bytes(budget)}"
            )

        def cost(start: int, stop: int) -> float | None:
            fits = self._least_peak(start, stop) <= budget
            return sum(self._passes_flops(start, stop)) if fits else None

        points = self._points(self._path(cost, lambda a, b: a + b))
        segments = tuple(self._segment(a, b, budget) for a, b in pairwise(points))
        flops = sum(step.flops for segment in segments for step in segment.passes)
        ledger, last = self.ledger, self.ledger.last
        peaks = [step.peak for segment in segments for step in segment.passes]
        stored = [0, *(segment.stored for segment in segments[:-1]), 0]
        return Plan(
            half=self.half,
            config=self.config,
            shape=self.shape,
            result_shape=(self.shape[0], ledger.layers[-1].outputs, *ledger.sizes[last]),
            dtype=self.dtype,
            budget=budget,
            offload=self.offload,
            segments=segments,
            peak=max(self.entry, self._leave, *peaks),
            parked=max(a + b for a, b in pairwise(stored)) if self.offload else 0,
            flops=flops * self.shape[0],
            extra=flops / sum(ledger.flops),
        )

    def least(self) -> int:
        """The least budget that works."""
        return max(self.entry, self._leave, int(self._path(self._least_peak, max)[-1][0]))

    @property
    def _leave(self) -> int:
        """Bytes when all is done: encoding clamps half of its result into a new tensor."""
        return self.result * 2 if self.half == "encode" else self.result

    def _path(
        self,
        price: Callable[[int, int], float | None],
        join: Callable[[float, float], float],
    ) -> list[tuple[float, int]]:
        """For every point the least joined price of a way there, and the point before it."""
        best: list[tuple[float, int]] = [(0, 0)]
        for stop in range(1, self.ledger.last + 1):
            found: tuple[float, int] = (float("inf"), -1)
            for start in range(stop):  # of equal ways the one that stores less often
                if best[start][0] == float("inf") or not self._joined(start, stop):
                    continue
                paid = price(start, stop)
                if paid is not None and join(best[start][0], paid) < found[0]:
                    found = join(best[start][0], paid), start
            best.append(found)
        return best

    def _points(self, best: list[tuple[float, int]]) -> list[int]:
        points = [self.ledger.last]
        while points[-1] > 0:
            points.append(best[points[-1]][1])
        return points[::-1]

    def _joined(self, start: int, stop: int) -> bool:
        """Whether one segment may lead from start to stop: the attention has one of its own."""
        inner = self.ledger.layers[start:stop]
        return len(inner) == 1 or not any(layer.attends for layer in inner)

    def _stops(self, start: int, stop: int) -> list[int]:
        """Where the passes of a segment end: at every norm on the way, then at its end."""
        layers = self.ledger.layers
        return [n for n in range(start + 1, stop) if layers[n].norm] + [stop]

    def _passes_flops(self, start: int, stop: int) -> list[float]:
        flops = self.ledger.flops
        return [sum(flops[start:end]) for end in self._stops(start, stop)]

    def _least_peak(self, start: int, stop: int) -> int:
        return max(
            self._peak(start, stop, end, 1, produces=end == stop)
            for end in self._stops(start, stop)
        )

    def _segment(self, start: int, stop: int, budget: int) -> Segment:
        ends = self._stops(start, stop)
        passes = []
        for end, flops in zip(ends, self._passes_flops(start, stop), strict=True):
            few, many = 1, self.ledger.frames(start)
            while few < many:  # the longest chunk that fits
                length = (few + many + 1) // 2
                if self._peak(start, stop, end, length, produces=end == stop) <= budget:
                    few = length
                else:
                    many = length - 1
            peak = self._peak(start, stop, end, few, produces=end == stop)
            passes.append(Pass(end, few, peak, flops))
        return Segment(start, stop, tuple(passes), self._stored(stop))

    def _stored(self, point: int) -> int:
        """Bytes of what is stored at a point; the clip that was given does not count."""
        if point == 0:
            return 0
        beside = self.ledger.map_bytes(point - 1) if self.ledger.inside(point) else 0
        return self.ledger.map_bytes(point) + beside

    def _peak(self, start: int, stop: int, end: int, length: int, *, produces: bool) -> int:
        """Bytes in use during the pass that goes from start to end, as part of a segment to stop.

        The last pass gives up each stored frame when it has been read and adds those it makes: the
        sum is largest at the first chunk or at the last one, since both go on at an even pace.
        """
        key = start, length
        if key not in self._work:
            self._work[key] = self.ledger.work(start, length, given=start == 0)
        work = self._work[key][end - start - 1]
        before = 0 if self.offload else self._stored(start)
        final = stop == self.ledger.last
        # the result of a batch is there from the first clip's last pass on
        result = self.result if (produces and final) or self.shape[0] > 1 else 0
        if not produces:
            return work.busy + before + result
        frames, made = self.ledger.frames(start), self.ledger.frames(stop)
        chunk = min(length, frames)
        left = before * (frames - chunk) // frames + 1
        if final:
            return work.busy + left + result
        after, last = 0 if self.offload else self._stored(stop), 0
        if self.ledger.inside(stop) and start == stop - 1:
            # the map at the start stays, for the sum
            left, last, after = before, before, after - before

        def stored(read: int) -> int:
            """Bytes made of so many frames of the start."""
            share = (1 + (read - 1) * (made - 1) / max(frames - 1, 1)) / made if read else 0.0
            return int(after * min(share, 1)) + 1

        rest = (frames - 1) // chunk * chunk  # before the last chunk
        # where a chunk goes on in pieces, some are stored while the others are worked on
        split = stored(chunk) * made > after * length
        busy = max(left + (stored(chunk) if split else 0), last + stored(frames if split else rest))
        arrived = max(left + stored(chunk), last + after)
        return result + max(work.busy + busy, work.arrived + arrived)
