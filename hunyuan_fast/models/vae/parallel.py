"""A clip through the VAE by several processes, with the values of one.

Every map is cut along its longer side, and each process has one strip of it, with a margin of one
row on either side. Those margins hold the rows of the neighbours when a convolution reads them;
what comes out is then right but for its own margins, where the convolution repeated the edge, and
the neighbours' rows take their place before the next one reads. Norms take the statistics of all
strips, merged in the order of the ranks, the same on all of them. Queries of the attention stay
where they are, and meet the keys and values of all strips.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.halos import exchange_margins
from hunyuan_fast.models.vae.chain import Chunk, Convolution, normed
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.cut import Cut
from hunyuan_fast.models.vae.layers import Half
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.ops import (
    frame_causal_attention,
    group_norm_stats,
    merge_group_norm_stats,
)
from hunyuan_fast.ops.collectives import gather

_LAYOUT = torch.channels_last_3d


@torch.no_grad()
def in_strips(
    vae: nn.Module,
    config: VAEConfig,
    half: Half,
    clip: Tensor,
    group: ProcessGroup,
    dtype: torch.dtype,
) -> Tensor:
    """Encode or decode a batch (B, C, T, H, W) that all ranks have: moments, or pixels, on all.

    dtype: of the maps
    """
    return _Strip(vae, config, half, clip, group, dtype).run()


class _Strip:
    """The strip of this rank on its way through all layers.

    Nothing but collectives happens on a rank without rows, of which there are some where the group
    has more ranks than the latents have rows.
    """

    def __init__(
        self,
        vae: nn.Module,
        config: VAEConfig,
        half: Half,
        clip: Tensor,
        group: ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        self._vae, self._clip, self._group, self._dtype = vae, clip, group, dtype
        self._groups, self._rank = config.norm_num_groups, group.rank()
        self._cut = Cut(config, half, tuple(clip.shape), group.size())
        self._dim = self._cut.dim
        self._idle = self._cut.strips[0].sizes[self._rank] == 0

    def run(self) -> Tensor:
        """Through all layers, and all strips together."""
        cut, dim = self._cut, self._dim
        first, stop = cut.strips[0].held(self._rank)
        part = self._clip.narrow(dim, first, stop - first).to(self._dtype)
        chunk = Chunk(0, part.contiguous(memory_format=_LAYOUT))
        for index in range(len(cut.layers)):
            self._advance(chunk, index)
        own = self._own(chunk.take(), len(cut.layers))
        whole = gather(own, cut.strips[-1].sizes, self._group, dim=dim)
        return whole.contiguous(memory_format=_LAYOUT)

    def _own(self, x: Tensor, point: int) -> Tensor:
        return self._cut.strips[point].own_part(x, self._rank, self._dim)

    def _advance(self, chunk: Chunk, index: int) -> None:
        """Through one layer; statistics are taken while margins are on their way."""
        layer, x = self._cut.layers[index], chunk.x
        assert x is not None
        before, after = self._cut.fetched[index]
        exchange = None
        if before or after:
            exchange = exchange_margins(
                x, self._cut.strips[index], self._group, dim=self._dim, before=before, after=after
            )
        stats = self._stats(self._own(x, index)) if layer.norm else None
        del x
        if exchange is not None:
            exchange.wait()
        if layer.attends:
            self._attend(chunk, index, stats)
        elif self._idle:
            shape = (len(self._clip), layer.outputs, *self._cut.part_size(index + 1, self._rank))
            chunk.x = self._clip.new_empty(shape, dtype=self._dtype)
        else:
            self._convolve(chunk, index, stats)

    def _stats(self, own: Tensor) -> Tensor:
        """Statistics of the whole map."""
        batch = len(own)
        if self._idle:
            mine = own.new_zeros((3, batch, self._groups), dtype=torch.float64)
        else:
            # rows of several frames would be copied, those of one lie together
            frames = own.split(1, dim=2)
            mine = merge_group_norm_stats([group_norm_stats(f, self._groups) for f in frames])
        every = gather(mine[None], (1,) * self._group.size(), self._group, dim=0)
        return merge_group_norm_stats(every.unbind())

    def _convolve(self, chunk: Chunk, index: int, stats: Tensor | None) -> None:
        layer, dim = self._cut.layers[index], self._dim
        stride, factor = layer.stride[dim - 2], layer.factor[dim - 2]
        came, made = (self._cut.strips[point].held(self._rank) for point in (index, index + 1))
        if missing := came[0] % stride:
            # steps begin at the first row of all; nothing that is right is made of this one
            assert chunk.x is not None
            chunk.x = torch.cat((chunk.x.narrow(dim, 0, missing), chunk.x), dim)
        Convolution(self._vae, layer, stats, last=True)(chunk)
        if factor > 1:
            # two rows for one of the margin, the outer of which is wrong
            x = chunk.take().narrow(dim, made[0] - factor * came[0], made[1] - made[0])
            chunk.x = x.contiguous(memory_format=_LAYOUT)

    def _attend(self, chunk: Chunk, index: int, stats: Tensor | None) -> None:
        """Queries of this strip over the keys of all strips."""
        layer = self._cut.layers[index]
        module = cast(FrameCausalAttention, self._vae.get_submodule(layer.conv))
        assert chunk.x is not None
        own = self._own(chunk.x, index)
        y = own if self._idle else normed(own, module.group_norm, stats, silu=False)
        rows = y.movedim(1, -1)
        keys = self._tokens(module.to_k(rows), index)
        values = self._tokens(module.to_v(rows), index)
        if self._idle:
            return
        _, height, width = self._cut.sizes[index]
        out = frame_causal_attention(
            module.to_q(rows).flatten(1, 3)[:, :, None],
            keys[:, :, None],
            values[:, :, None],
            tokens_per_frame=height * width,
            query_tokens_per_frame=rows.shape[2] * rows.shape[3],
        )
        own += module.to_out[0](out[:, :, 0]).view(rows.shape).movedim(-1, 1)

    def _tokens(self, rows: Tensor, index: int) -> Tensor:
        """(B, T, h, w, C) of this strip to (B, T H W, C) of all strips."""
        sizes = self._cut.strips[index].sizes
        whole = gather(rows, sizes, self._group, dim=self._dim - 1)
        return whole.flatten(1, 3)
