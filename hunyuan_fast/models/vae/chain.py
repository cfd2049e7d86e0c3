"""Chunks of frames on their way through a chain of layers, each of which remembers its past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hunyuan_fast.models.vae.layers import Layer
from hunyuan_fast.ops import (
    causal_conv3d,
    group_norm_affine,
    group_norm_silu,
    upsample_causal_conv3d,
)
from hunyuan_fast.ops.causal_conv3d import fuses_norm

_UNKNOWN = "a norm was applied before its statistics were known"


@dataclass
class Chunk:
    """Frames on their way: before layer `index` of a chain, with what a later sum will add."""

    index: int
    x: Tensor | None
    skip: Tensor | None = None

    @property
    def frames(self) -> int:
        """How many they are."""
        assert self.x is not None
        return self.x.shape[2]

    def cut(self, rows: slice | None) -> None:
        """Leave views of these rows; None: of all."""
        if rows is not None and self.x is not None:
            self.x = self.x[:, :, :, rows]
            self.skip = None if self.skip is None else self.skip[:, :, :, rows]

    def take(self) -> Tensor:
        """The frames, which the chunk lets go of, so that they can be freed."""
        x, self.x = self.x, None
        assert x is not None
        return x


class Convolution:
    """A layer that remembers what the next chunk has to know of those before it.

    stats: of the norm, over the whole clip; last: whether no chunk comes after the first one.
    """

    def __init__(
        self, vae: nn.Module, layer: Layer, stats: Tensor | None, *, last: bool = False
    ) -> None:
        self._layer, self._stats, self._last = layer, stats, last
        self._conv = cast(nn.Conv3d, vae.get_submodule(layer.conv))
        self._norm = cast(nn.GroupNorm, vae.get_submodule(layer.norm)) if layer.norm else None
        self._shortcut = (
            cast(nn.Conv3d, vae.get_submodule(layer.shortcut)) if layer.shortcut else None
        )
        self._vectors: tuple[Tensor, Tensor] | None = None
        self._past: Tensor | None = None
        self._seen = self._made = 0

    def __call__(self, chunk: Chunk) -> None:
        """Move the chunk one layer on; it may come out with no frames where time is halved."""
        x = chunk.take()
        if self._layer.opens:
            chunk.skip = x
        if self._norm is not None:
            x = self._normed(x, self._norm)
        summand = None
        if self._layer.closes:
            summand, chunk.skip = chunk.skip, None
            assert summand is not None
            if self._shortcut is not None:
                summand = causal_conv3d(summand, self._shortcut.weight, self._shortcut.bias)
        chunk.x = self._convolved(x, summand)

    def _normed(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """x with its norm applied, or x where the convolution does that, to past frames too."""
        if not fuses_norm(x, self._conv.weight):
            return normed(x, norm, self._stats)
        if self._vectors is None:
            assert self._stats is not None, _UNKNOWN
            self._vectors = group_norm_affine(self._stats, norm.weight, norm.bias, eps=norm.eps)
        return x

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
        scale, shift = self._vectors or (None, None)
        y = causal_conv3d(
            x,
            weight,
            bias,
            stride=layer.stride,
            past=past,
            scale=scale,
            shift=shift,
            residual=summand,
        )
        self._remember(x, self._seen + layer.kernel - 1 - step * self._made)
        return y

    def _remember(self, x: Tensor, count: int) -> None:
        """Keep copies of the last `count` frames of the past and x; too few: the first one again.

        They take the place of those before where there are as many, so that none live twice.
        """
        if self._last:
            return
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


def normed(x: Tensor, norm: nn.GroupNorm, stats: Tensor | None, *, silu: bool = True) -> Tensor:
    """The norm of a chunk by the statistics of its whole clip."""
    assert stats is not None, _UNKNOWN
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu, stats=stats
    )


def pieces(chunk: Chunk, length: int) -> list[Chunk]:
    """What a layer has left of a chunk, in pieces of at most `length` frames, the first one last.

    Only upsampling makes a chunk longer, and it never stands within a residual block.
    """
    x = chunk.take()
    frames, index = x.shape[2], chunk.index + 1
    if frames <= length:
        return [Chunk(index, x, chunk.skip)] if frames else []
    return [Chunk(index, piece) for piece in reversed(x.split(length, dim=2))]
