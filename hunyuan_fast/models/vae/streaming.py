"""Sending a clip through the VAE by a plan: chunks of frames, with the result of the whole clip.

Every layer looks only backwards in time, so a chunk can go through a chain of them when each
convolution remembers the last frames of its own input and each norm knows the statistics of the
whole clip. Those are collected by passes that go as far as the norm and keep nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hunyuan_fast.models.vae.film import Film, spans
from hunyuan_fast.models.vae.layers import Layer, layers_of, sizes_of
from hunyuan_fast.models.vae.pages import give_back, own_pages
from hunyuan_fast.models.vae.plan import Pass, Plan, Segment
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.ops import (
    causal_conv3d,
    frame_causal_attention,
    group_norm_silu,
    group_norm_stats,
    merge_group_norm_stats,
    upsample_causal_conv3d,
)

Progress = Callable[[float], None]


@dataclass
class _Chunk:
    """Frames on their way: before layer `index` of a chain, with what a later sum will add."""

    index: int
    x: Tensor | None
    skip: Tensor | None = None

    def take(self) -> Tensor:
        """The frames, which the chunk lets go of, so that they can be freed."""
        x, self.x = self.x, None
        assert x is not None
        return x


class _Input:
    """The clip that was given, read like a `Film`, in the dtype of the maps, channels-last."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self._x, self._dtype = x, dtype

    def read(self, start: int, stop: int, *, last: bool) -> Tensor:
        chunk = self._x[:, :, start:stop].to(self._dtype)
        return chunk.contiguous(memory_format=torch.channels_last_3d)


class _Convolution:
    """A layer that remembers what the next chunk has to know of those before it."""

    def __init__(self, vae: nn.Module, layer: Layer, stats: Tensor | None) -> None:
        self._layer, self._stats = layer, stats
        self._conv = cast(nn.Conv3d, vae.get_submodule(layer.conv))
        self._norm = cast(nn.GroupNorm, vae.get_submodule(layer.norm)) if layer.norm else None
        self._shortcut = (
            cast(nn.Conv3d, vae.get_submodule(layer.shortcut)) if layer.shortcut else None
        )
        self._past: Tensor | None = None
        self._seen = self._made = 0

    def __call__(self, chunk: _Chunk) -> None:
        """Move the chunk one layer on; it may come out with no frames where time is halved."""
        x = chunk.take()
        if self._layer.opens:
            chunk.skip = x
        if self._norm is not None:
            x = _normed(x, self._norm, self._stats)
        summand = None
        if self._layer.closes:
            summand, chunk.skip = chunk.skip, None
            assert summand is not None
            if self._shortcut is not None:
                summand = causal_conv3d(summand, self._shortcut.weight, self._shortcut.bias)
        chunk.x = self._convolved(x, summand)

    def _convolved(self, x: Tensor, summand: Tensor | None) -> Tensor:
        weight, bias, layer = self._conv.weight, self._conv.bias, self._layer
        if layer.kernel == 1:
            return causal_conv3d(x, weight, bias)
        past, frames = self._past, x.shape[2]
        if layer.upsamples:
            y = upsample_causal_conv3d(x, weight, bias, factor=layer.factor, past=past)
            self._remember(x, 1 if layer.factor[0] == 2 else layer.kernel - 1)
            return y
        before, step = 0 if past is None else past.shape[2], layer.stride[0]
        self._seen += frames
        if past is not None and before + frames < layer.kernel:
            self._past = torch.cat((past, x), dim=2)
            return x.new_empty(1, layer.outputs, 0, 1, 1)
        made = frames - 1 if past is None else before + frames - layer.kernel
        self._made += made // step + 1
        y = causal_conv3d(x, weight, bias, stride=layer.stride, past=past, residual=summand)
        self._remember(x, self._seen + layer.kernel - 1 - step * self._made)
        return y

    def _remember(self, x: Tensor, count: int) -> None:
        """Keep copies of the last `count` frames of the past and x; too few: the first one again.

        They take the place of those before where there are as many, so that none live twice.
        """
        frames, past, kept = x.shape[2], self._past, self._past
        if kept is None or kept.shape[2] != count:
            shape = (1, x.shape[1], count, *x.shape[3:])
            layout = torch.channels_last_3d
            kept = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for place in range(count):
            source = place + frames - count
            if source >= 0 or past is None:
                newer = x[:, :, max(source, 0)]
            else:
                newer = past[:, :, past.shape[2] + source]
            kept[:, :, place].copy_(newer)
        self._past = kept


def _normed(x: Tensor, norm: nn.GroupNorm, stats: Tensor | None, *, silu: bool = True) -> Tensor:
    assert stats is not None, "a norm was applied before its statistics were known"
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu, stats=stats
    )


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

    def run(self, write: Callable[[Tensor], None]) -> None:
        """Every segment; `write` takes the frames of the result in order."""
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
        groups = self._plan.config.norm_num_groups
        self._sweep(
            segment,
            step,
            lambda chunk: found.append(group_norm_stats(chunk.take(), groups)),
            last=False,
        )
        self._stats[step.stop] = merge_group_norm_stats(found)

    def _produce(self, segment: Segment, write: Callable[[Tensor], None] | None) -> None:
        """The map at the end of the segment, and the statistics of a norm that comes next."""
        stop = segment.stop
        opened = write is None and self._layers[stop - 1].opens
        # what the residual block adds later: the map we start from, or one made on the way
        whole = opened and segment.start == stop - 1
        main, side = self._film(), self._film() if opened and not whole else None
        found: list[Tensor] = []
        measures = write is None and self._layers[stop].norm is not None
        groups = self._plan.config.norm_num_groups

        def keep(chunk: _Chunk) -> None:
            x = chunk.take()
            if write is not None:
                write(x)
                return
            if measures:
                found.append(group_norm_stats(x, groups))
            main.append(x)
            if side is not None and chunk.skip is not None:
                side.append(chunk.skip)

        self._sweep(segment, segment.passes[-1], keep, last=not whole)
        if measures:
            self._stats[stop] = merge_group_norm_stats(found)
        if whole:
            assert isinstance(self._main, Film)
            side = self._main
        self._main, self._side = main, side

    def _film(self) -> Film:
        return Film(parked=self._plan.offload)

    def _sweep(
        self, segment: Segment, step: Pass, sink: Callable[[_Chunk], None], *, last: bool
    ) -> None:
        """Send all frames from the start of the segment to `step.stop`, chunk by chunk."""
        chain = range(segment.start, step.stop)
        stages = [_Convolution(self._vae, self._layers[n], self._stats.get(n)) for n in chain]
        frames = self._sizes[segment.start][0]
        for start, stop in spans(frames, step.frames):
            side = self._side.read(start, stop, last=last) if self._side else None
            waiting = [_Chunk(0, self._main.read(start, stop, last=last), side)]
            del side
            while waiting:
                chunk = waiting.pop()
                if chunk.index == len(stages):
                    sink(chunk)
                    continue
                stages[chunk.index](chunk)
                waiting += _pieces(chunk, step.frames)
            self._counter.add(step.flops * (stop - start) / frames)

    def _attend(self, segment: Segment) -> None:
        """The middle attention: keys and values of all frames first, then frame after frame."""
        step, index = segment.passes[-1], segment.start
        layer = self._layers[index]
        module = cast(FrameCausalAttention, self._vae.get_submodule(layer.conv))
        frames, height, width = self._sizes[index]
        area, channels, stats = height * width, layer.inputs, self._stats[index]

        def tokens(x: Tensor) -> Tensor:
            normed = _normed(x, module.group_norm, stats, silu=False)
            return normed.movedim(1, -1).reshape(1, -1, 1, channels)

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


def _pieces(chunk: _Chunk, length: int) -> list[_Chunk]:
    """What a layer has left of a chunk, in pieces of at most `length` frames, the first one last.

    Only upsampling makes a chunk longer, and it never stands within a residual block.
    """
    x = chunk.take()
    frames, index = x.shape[2], chunk.index + 1
    if frames <= length:
        return [_Chunk(index, x, chunk.skip)] if frames else []
    return [_Chunk(index, piece) for piece in reversed(x.split(length, dim=2))]


@torch.no_grad()
def stream(vae: nn.Module, plan: Plan, clip: Tensor, progress: Progress | None = None) -> Tensor:
    """Encode or decode a batch (B, C, T, H, W) as planned: moments, or pixels.

    progress: called with the part of the planned arithmetic that is done, from above 0 to 1.
    """
    counter = _Counter(plan, progress)
    out: Tensor | None = None
    shape = plan.result_shape

    def writer(index: int) -> Callable[[Tensor], None]:
        position = 0

        def write(x: Tensor) -> None:
            nonlocal out, position
            if out is None:
                out = torch.empty(
                    shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
                )
            out[index : index + 1, :, position : position + x.shape[2]] = x
            position += x.shape[2]

        return write

    with own_pages():
        for index in range(shape[0]):
            _Sample(vae, plan, clip[index : index + 1], counter).run(writer(index))
    assert out is not None
    return out
