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
from torch.nn import functional as F

from hunyuan_fast.distributed.collectives import gather
from hunyuan_fast.distributed.halos import Exchange, Strips, exchange_margins
from hunyuan_fast.distributed.shards import split_sizes
from hunyuan_fast.models.vae.chain import Chunk, Convolution, normed
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, Layer, layers_of, sizes_of
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.ops import group_norm_stats, merge_group_norm_stats

_MARGIN = 1
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
        self._groups = config.norm_num_groups
        self._rank = group.rank()
        self._layers = layers_of(config, half)
        self._sizes = sizes_of(self._layers, (clip.shape[2], clip.shape[3], clip.shape[4]))
        _, height, width = self._sizes[-1 if half == "encode" else 0]
        # of a map (B, C, T, H, W)
        self._dim = 3 if height >= width else 4
        latents = max(height, width)
        shares = split_sizes(latents, group.size())
        self._strips = [
            Strips(tuple(n * (size[self._dim - 2] // latents) for n in shares), _MARGIN)
            for size in self._sizes
        ]
        self._idle = shares[self._rank] == 0
        # whether the margins are what the neighbours have there
        self._fresh = True

    def run(self) -> Tensor:
        """Through all layers, and all strips together."""
        first, stop = self._strips[0].held(self._rank)
        part = self._clip.narrow(self._dim, first, stop - first)
        chunk = Chunk(0, part.to(self._dtype).contiguous(memory_format=_LAYOUT))
        for index in range(len(self._layers)):
            self._advance(chunk, index)
        own = self._own(chunk.take(), len(self._layers))
        whole = gather(own, self._strips[-1].sizes, self._group, dim=self._dim)
        return whole.contiguous(memory_format=_LAYOUT)

    def _own(self, x: Tensor, point: int) -> Tensor:
        return self._strips[point].own_part(x, self._rank, self._dim)

    def _advance(self, chunk: Chunk, index: int) -> None:
        """Through one layer; statistics are taken while margins are on their way."""
        layer, x = self._layers[index], chunk.x
        assert x is not None
        exchange = self._exchange(x, index)
        stats = self._stats(self._own(x, index)) if layer.norm else None
        del x
        if exchange is not None:
            exchange.wait()
        if layer.attends:
            self._attend(chunk, index, stats)
        elif self._idle:
            frames, *area = self._sizes[index + 1]
            area[self._dim - 3] = 0
            shape = (len(self._clip), layer.outputs, frames, *area)
            chunk.x = self._clip.new_empty(shape, dtype=self._dtype)
        else:
            self._convolve(chunk, index, stats)

    def _exchange(self, x: Tensor, index: int) -> Exchange | None:
        """Fetch the rows that the layer reads beyond our own and that the margins lack."""
        layer = self._layers[index]
        if layer.attends or layer.kernel == 1 or self._fresh:
            return None
        before, after = _reach(layer, self._dim)
        strips = self._strips[index]
        return exchange_margins(x, strips, self._group, dim=self._dim, before=before, after=after)

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
        layer, dim = self._layers[index], self._dim
        stride, factor = layer.stride[dim - 2], layer.factor[dim - 2]
        came, made = (self._strips[point].held(self._rank) for point in (index, index + 1))
        if missing := came[0] % stride:
            # steps begin at the first row of all; nothing that is right is made of this one
            assert chunk.x is not None
            chunk.x = torch.cat((chunk.x.narrow(dim, 0, missing), chunk.x), dim)
        Convolution(self._vae, layer, stats, last=True)(chunk)
        if factor > 1:
            # two rows for one of the margin: the outer one goes, the inner one is right
            x = chunk.take().narrow(dim, made[0] - factor * came[0], made[1] - made[0])
            chunk.x = x.contiguous(memory_format=_LAYOUT)
        self._fresh = factor > 1 or (layer.kernel == 1 and self._fresh)

    def _attend(self, chunk: Chunk, index: int, stats: Tensor | None) -> None:
        """Queries of this strip, frame by frame, over the keys of all strips."""
        layer = self._layers[index]
        module = cast(FrameCausalAttention, self._vae.get_submodule(layer.conv))
        assert chunk.x is not None
        own = self._own(chunk.x, index)
        y = own if self._idle else normed(own, module.group_norm, stats, silu=False)
        rows = y.movedim(1, -1)
        keys = self._tokens(module.to_k(rows), index)
        values = self._tokens(module.to_v(rows), index)
        self._fresh = False
        if self._idle:
            return
        frames, height, width = self._sizes[index]
        for frame in range(frames):
            seen = (frame + 1) * height * width
            queries = module.to_q(rows[:, frame]).flatten(1, 2)
            out = F.scaled_dot_product_attention(
                queries[:, None], keys[:, None, :seen], values[:, None, :seen]
            )
            out = module.to_out[0](out[:, 0]).view(rows[:, frame].shape)
            own[:, :, frame] += out.movedim(-1, 1)

    def _tokens(self, rows: Tensor, index: int) -> Tensor:
        """(B, T, h, w, C) of this strip to (B, T H W, C) of all strips."""
        sizes = self._strips[index].sizes
        whole = gather(rows, sizes, self._group, dim=self._dim - 1)
        return whole.flatten(1, 3)


def _reach(layer: Layer, dim: int) -> tuple[int, int]:
    """Rows that a layer reads before and after those that it makes its rows of.

    With a stride of two the last tap of the last row meets the last row of the strip.
    """
    reach = layer.kernel // 2
    return reach, reach if layer.stride[dim - 2] == 1 else 0
