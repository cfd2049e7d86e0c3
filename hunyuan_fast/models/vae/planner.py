"""How to encode or decode a clip within so much memory: which maps to store, how to cut the passes.

A plan is a pure function of shapes, dtype and device. Storing every map costs no arithmetic,
storing few costs passes; strips cost what their halos do. Of all ways that fit, a plan takes the
one with the least arithmetic, and then the longest chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from hunyuan_fast.models.vae.budget import show_bytes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.cost import Ledger, Span, Work
from hunyuan_fast.models.vae.layers import Half
from hunyuan_fast.models.vae.plan import Pass, Plan, Segment, Shape
from hunyuan_fast.models.vae.workspace import answering

# Numbers of strips that are weighed.
_STRIPS = (1, 2, 4, 8, 16)


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
    return _planner(config, "decode", shape, dtype, offload, device).plan(budget)


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
    return _planner(config, "encode", shape, dtype, offload, device).plan(budget)


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
    return _planner(config, half, shape, dtype, offload, device).least()


def _planner(
    config: VAEConfig,
    half: Half,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    offload: bool,
    device: torch.device | str,
) -> _Planner:
    answers = answering(dtype, torch.device(device))
    return _cached_planner(config, half, tuple(shape), dtype, offload, answers)


class _Planner:
    """The choice of stored maps, by dynamic programming over the points between layers."""

    def __init__(
        self,
        config: VAEConfig,
        half: Half,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        offload: bool,
        answers: str,
    ) -> None:
        batch, channels, frames, height, width = shape
        self.config, self.half, self.dtype, self.offload = config, half, dtype, offload
        self.shape: Shape = (batch, channels, frames, height, width)
        self.ledger = Ledger(config, half, (frames, height, width), dtype, answers)
        self.result = batch * self.ledger.map_bytes(self.ledger.last)
        self._works: dict[tuple[int, int, int, int], list[Work]] = {}
        self._spans: dict[tuple[int, int, int], Span] = {}
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

        whole = self._whole_plan(budget)
        if whole is not None:
            return whole

        def cost(start: int, stop: int) -> float | None:
            flops = 0.0
            for end in self._stops(start, stop):
                count = self._fewest(start, stop, end, budget)
                if count is None:
                    return None
                flops += self._flops(start, end, count)
            return flops

        points = self._points(self._path(cost, lambda a, b: a + b))
        segments = tuple(self._segment(a, b, budget) for a, b in pairwise(points))
        stored = [0, *(segment.stored for segment in segments[:-1]), 0]
        return Plan(
            **self._common(budget),
            segments=segments,
            peak=max(self.entry, self._leave, *(s.peak for seg in segments for s in seg.passes)),
            parked=max(a + b for a, b in pairwise(stored)) if self.offload else 0,
            flops=sum(s.flops for seg in segments for s in seg.passes) * self.shape[0],
        )

    def _whole_plan(self, budget: int) -> Plan | None:
        """The plain pass, over all clips or over one after the other, where it fits."""
        for clips in (self.shape[0], 1):
            peak = self._whole(clips)
            if peak <= budget:
                flops = sum(self.ledger.flops) * self.shape[0]
                return Plan(**self._common(budget), together=clips, peak=peak, flops=flops)
        return None

    def _whole(self, clips: int) -> int:
        """Bytes of the plain pass over so many clips at a time."""
        gathered = self.result if clips < self.shape[0] else 0
        return max(self.entry, self.ledger.whole(clips) + gathered)

    def _common(self, budget: int) -> dict[str, Any]:
        """What every plan says, whatever it does."""
        ledger = self.ledger
        return {
            "half": self.half,
            "config": self.config,
            "shape": self.shape,
            "result_shape": (
                *(self.shape[0], ledger.layers[-1].outputs),
                *ledger.sizes[ledger.last],
            ),
            "dtype": self.dtype,
            "budget": budget,
            "offload": self.offload,
            "least_flops": sum(ledger.flops) * self.shape[0],
        }

    def least(self) -> int:
        """The least budget that works."""
        chunks = max(self.entry, self._leave, int(self._path(self._least_peak, max)[-1][0]))
        return min(chunks, self._whole(1))

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

    def _counts(self, start: int, end: int) -> list[int]:
        """Numbers of strips that a pass may have."""
        most = 1 if self.ledger.layers[start].attends else self.ledger.heights[end]
        return [count for count in _STRIPS if count <= most]

    def _fewest(self, start: int, stop: int, end: int, budget: int) -> int | None:
        """The fewest strips with which a pass fits, since each one more adds to the arithmetic."""
        for count in self._counts(start, end):
            if self._peak(start, stop, end, 1, count) <= budget:
                return count
        return None

    def _flops(self, start: int, end: int, count: int) -> float:
        if count == 1:
            return sum(self.ledger.flops[start:end])
        return self._span(start, end, count).flops

    def _least_peak(self, start: int, stop: int) -> int:
        """The least bytes of a segment; of its passes in one strip and in the most of them."""
        return max(
            min(
                self._peak(start, stop, end, 1, count)
                for count in {1, self._counts(start, end)[-1]}
            )
            for end in self._stops(start, stop)
        )

    def _segment(self, start: int, stop: int, budget: int) -> Segment:
        passes = []
        for end in self._stops(start, stop):
            count = self._fewest(start, stop, end, budget)
            assert count is not None
            few, many = 1, self.ledger.frames(start)
            while few < many:  # the longest chunk that fits
                length = (few + many + 1) // 2
                if self._peak(start, stop, end, length, count) <= budget:
                    few = length
                else:
                    many = length - 1
            peak = self._peak(start, stop, end, few, count)
            passes.append(Pass(end, few, count, peak, self._flops(start, end, count)))
        return Segment(start, stop, tuple(passes), self._stored(stop))

    def _stored(self, point: int) -> int:
        """Bytes of what is stored at a point; the clip that was given does not count."""
        if point == 0:
            return 0
        beside = self.ledger.map_bytes(point - 1) if self.ledger.inside(point) else 0
        return self.ledger.map_bytes(point) + beside

    def _span(self, start: int, end: int, count: int) -> Span:
        key = start, end, count
        if key not in self._spans:
            self._spans[key] = self.ledger.span(start, end, count)
        return self._spans[key]

    def _work(self, start: int, end: int, length: int, count: int) -> Work:
        # whole maps are alike whatever comes after them
        key = start, 0 if count == 1 else end, length, count
        if key not in self._works:
            rows = None if count == 1 else self._span(start, end, count)
            self._works[key] = self.ledger.work(start, length, given=start == 0, rows=rows)
        return self._works[key][end - start - 1]

    def _peak(self, start: int, stop: int, end: int, length: int, count: int) -> int:
        """Bytes in use during the pass that goes from start to end, as part of a segment to stop.

        The last pass gives up each stored frame when it has been read and adds those it makes: the
        sum is largest at the first chunk or at the last one, since both go on at an even pace. With
        strips both maps are there as a whole.
        """
        work, produces = self._work(start, end, length, count), end == stop
        before = 0 if self.offload else self._stored(start)
        final = stop == self.ledger.last
        # the result of a batch is there from the first clip's last pass on
        result = self.result if (produces and final) or self.shape[0] > 1 else 0
        if not produces:
            return work.busy + before + result
        frames, made = self.ledger.frames(start), self.ledger.frames(stop)
        chunk = min(length, frames)
        left = before * (frames - chunk) // frames + 1 if count == 1 else before
        if final:
            return work.busy + left + result
        after, last = 0 if self.offload else self._stored(stop), 0
        if self.ledger.inside(stop) and start == stop - 1:
            # the map at the start stays, for the sum
            left, last, after = before, before, after - before
        if count > 1:
            return work.busy + before + after + result

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


# The command line asks for the least budgets, then for plans, and the model once more for them.
_cached_planner = lru_cache(maxsize=8)(_Planner)
