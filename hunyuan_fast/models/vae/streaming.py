"""Sending a clip through the VAE by a plan: chunks of frames, with the result of the whole clip.

Every layer looks only backwards in time, so a chunk can go through a chain of them when each
convolution remembers the last frames of its own input and each norm knows the statistics of the
whole clip. Those are collected by passes that go as far as the norm and keep nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from hunyuan_fast.models.vae.chain import Chunk, Convolution, normed, pieces
from hunyuan_fast.models.vae.film import Film, spans
from hunyuan_fast.models.vae.layers import Rows, layers_of, sizes_of
from hunyuan_fast.models.vae.pages import give_back, own_pages
from hunyuan_fast.models.vae.plan import Pass, Plan, Progress, Segment
from hunyuan_fast.models.vae.strips import Course, course, strips
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.ops import frame_causal_attention, group_norm_stats, merge_group_norm_stats

# Frames, the first one's place among all, and their rows, None where they are whole.
Write = Callable[[Tensor, int, Rows | None], None]
Sink = Callable[[Chunk, int, Rows | None], None]


class _Input:
    """The clip that was given, read like a `Film`, in the dtype of the maps, channels-last."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self._x, self._dtype = x, dtype

    def read(self, start: int, stop: int, *, last: bool, rows: Rows | None = None) -> Tensor:
        part = self._x[:, :, start:stop]
        chunk = (part if rows is None else part[:, :, :, slice(*rows)]).to(self._dtype)
        return chunk.contiguous(memory_format=torch.channels_last_3d)


class _Counter:
    """Tells the caller which part of the planned arithmetic is done."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self._total, self._done, self._progress = plan.flops, 0.0, progress

    def add(self, flops: float) -> None:
        self._done += flops
        if self._progress is not None:
            self._progress(min(1.0, self._done / self._total))


class _Sample:
    """One clip on its way through all segments of a plan."""

    def __init__(self, vae: nn.Module, plan: Plan, clip: Tensor, counter: _Counter) -> None:
        self._vae, self._plan, self._counter = vae, plan, counter
        self._layers = layers_of(plan.config, plan.half)
        self._sizes = sizes_of(self._layers, plan.size)
        self._main: Film | _Input = _Input(clip, plan.dtype)
        self._side: Film | None = None
        self._stats: dict[int, Tensor] = {}

    def run(self, write: Write) -> None:
        """Every segment; `write` takes the parts of the result."""
        for segment in self._plan.segments:
            final = segment.stop == len(self._layers)
            for step in segment.passes[:-1]:
                self._measure(segment, step)
                give_back()
            if self._layers[segment.start].attends:
                self._attend(segment)
            else:
                self._produce(segment, write if final else None)
            give_back()

    def _measure(self, segment: Segment, step: Pass) -> None:
        """Statistics of the norm at `step.stop`, from a pass that keeps nothing else."""
        found: list[Tensor] = []
        self._sweep(
            segment, step, lambda chunk, *_: found.append(self._stats_of(chunk.take())), last=False
        )
        self._stats[step.stop] = merge_group_norm_stats(found)

    def _stats_of(self, x: Tensor) -> Tensor:
        groups = self._plan.config.norm_num_groups
        if x.is_contiguous(memory_format=torch.channels_last_3d):
            return group_norm_stats(x, groups)
        # rows of several frames would be copied, those of one lie together
        return merge_group_norm_stats([group_norm_stats(f, groups) for f in x.split(1, dim=2)])

    def _produce(self, segment: Segment, write: Write | None) -> None:
        """The map at the end of the segment, and the statistics of a norm that comes next."""
        stop = segment.stop
        opened = write is None and self._layers[stop - 1].opens
        # what the residual block adds later: the map we start from, or one made on the way
        whole = opened and segment.start == stop - 1
        main, side = self._film(), self._film() if opened and not whole else None
        found: list[Tensor] = []
        measures = write is None and self._layers[stop].norm is not None
        height = self._sizes[stop][1]

        def keep(chunk: Chunk, at: int, rows: Rows | None) -> None:
            x = chunk.take()
            if write is not None:
                write(x, at, rows)
                return
            if measures:
                found.append(self._stats_of(x))
            for film, frames in ((main, x), (side, chunk.skip)):
                if film is not None and frames is not None:
                    if rows is None:
                        film.append(frames)
                    else:
                        film.fill(at, rows, height, frames)

        self._sweep(segment, segment.passes[-1], keep, last=not whole)
        if measures:
            self._stats[stop] = merge_group_norm_stats(found)
        if whole:
            assert isinstance(self._main, Film)
            side = self._main
        self._main, self._side = main, side

    def _film(self) -> Film:
        return Film(parked=self._plan.offload)

    def _sweep(self, segment: Segment, step: Pass, sink: Sink, *, last: bool) -> None:
        """Send all frames from the start of the segment to `step.stop`, strip by strip."""
        if step.strips == 1:
            self._sweep_strip(segment, step, sink, last=last)
            return
        layers = self._layers[segment.start : step.stop]
        heights = [height for _, height, _ in self._sizes[segment.start : step.stop + 1]]
        for rows in strips(heights[-1], step.strips):
            # a frame is read again by the next strip, so that none can be given up
            self._sweep_strip(segment, step, sink, course(layers, heights, rows), last=False)

    def _sweep_strip(
        self, segment: Segment, step: Pass, sink: Sink, way: Course | None = None, *, last: bool
    ) -> None:
        """Send the rows of one strip through the chain, chunk by chunk of frames."""
        chain = range(segment.start, step.stop)
        lengths = [self._sizes[n][0] for n in chain]
        stages = [
            # frames that all come in one chunk are nobody's past
            Convolution(self._vae, self._layers[n], self._stats.get(n), last=whole <= step.frames)
            for n, whole in zip(chain, accumulate(lengths, max), strict=True)
        ]
        frames, arrived = lengths[0], 0
        rows = (way.came[0], way.used[-1]) if way else (None, None)
        for start, stop in spans(frames, step.frames):
            side = self._side.read(start, stop, last=last, rows=rows[0]) if self._side else None
            waiting = [Chunk(0, self._main.read(start, stop, last=last, rows=rows[0]), side)]
            del side
            while waiting:
                chunk = waiting.pop()
                if way is not None:
                    chunk.cut(way.cut(chunk.index))
                if chunk.index < len(stages):
                    stages[chunk.index](chunk)
                    waiting += pieces(chunk, step.frames)
                else:
                    count = chunk.frames
                    sink(chunk, arrived, rows[1])
                    arrived += count
            self._counter.add(step.flops * (stop - start) / frames / step.strips)

    def _attend(self, segment: Segment) -> None:
        """The middle attention: keys and values of all frames first, then frame after frame."""
        step, index = segment.passes[-1], segment.start
        layer = self._layers[index]
        module = cast(FrameCausalAttention, self._vae.get_submodule(layer.conv))
        frames, height, width = self._sizes[index]
        area, channels, stats = height * width, layer.inputs, self._stats[index]

        def tokens(x: Tensor) -> Tensor:
            y = normed(x, module.group_norm, stats, silu=False)
            return y.movedim(1, -1).reshape(1, -1, 1, channels)

        keys: Tensor | None = None
        for start, stop in spans(frames, step.frames):
            part = tokens(self._main.read(start, stop, last=False))
            key = module.to_k(part)
            if keys is None:
                keys = key.new_empty(1, frames * area, 1, channels)
                values = torch.empty_like(keys)
            keys[:, start * area : stop * area] = key
            values[:, start * area : stop * area] = module.to_v(part)
        assert keys is not None
        del part, key

        made, found = self._film(), []
        for start, stop in spans(frames, step.frames):
            x = self._main.read(start, stop, last=True)
            seen = stop * area
            out = frame_causal_attention(
                module.to_q(tokens(x)), keys[:, :seen], values[:, :seen], tokens_per_frame=area
            )
            out = module.to_out[0](out).view(1, stop - start, height, width, channels)
            x = x + out.movedim(-1, 1)
            found.append(group_norm_stats(x, module.group_norm.num_groups))
            made.append(x)
            self._counter.add(step.flops * (stop - start) / frames)
        self._stats[segment.stop] = merge_group_norm_stats(found)
        self._main = made


@torch.no_grad()
def stream(vae: nn.Module, plan: Plan, clip: Tensor, progress: Progress | None = None) -> Tensor:
    """Encode or decode a batch (B, C, T, H, W) as planned: moments, or pixels.

    progress: called with the part of the planned arithmetic that is done, from above 0 to 1.
    """
    counter = _Counter(plan, progress)
    out: Tensor | None = None
    shape = plan.result_shape

    def writer(index: int) -> Write:
        def write(x: Tensor, at: int, rows: Rows | None) -> None:
            nonlocal out
            if out is None:
                layout = torch.channels_last_3d
                out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
            place = out[index : index + 1, :, at : at + x.shape[2]]
            (place if rows is None else place[:, :, :, slice(*rows)]).copy_(x)

        return write

    with own_pages():
        for index in range(shape[0]):
            _Sample(vae, plan, clip[index : index + 1], counter).run(writer(index))
    assert out is not None
    return out
