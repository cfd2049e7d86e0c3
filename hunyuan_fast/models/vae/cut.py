"""How the maps of a clip lie on several processes, and what those send each other: from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from hunyuan_fast.distributed.halos import Strips
from hunyuan_fast.distributed.shards import split_sizes
from hunyuan_fast.distributed.traffic import Traffic
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, Layer, Size, layers_of, sizes_of

# Rows kept beyond those of a strip: what convolutions of three taps read, at any size of the map.
MARGIN = 1


@dataclass(frozen=True)
class Cut:
    """Strips of every map on the way of a clip through one half of the VAE.

    Maps are cut along the longer side of the latents, which are dealt out as evenly as they can be;
    pixels and all between go with their latents. Point p lies before layer p, as in `cost.Ledger`.

    shape: of the clip or the latents that go in, (B, C, T, H, W)
    """

    config: VAEConfig
    half: Half
    shape: tuple[int, ...]
    ranks: int

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What the clip meets, in order."""
        return layers_of(self.config, self.half)

    @cached_property
    def sizes(self) -> list[Size]:
        """(T, H, W) of the whole map at every point."""
        _, _, frames, height, width = self.shape
        return sizes_of(self.layers, (frames, height, width))

    @cached_property
    def dim(self) -> int:
        """Of a map (B, C, T, H, W) the one that is cut."""
        _, height, width = self._latents
        return 3 if height >= width else 4

    @property
    def _latents(self) -> Size:
        return self.sizes[-1 if self.half == "encode" else 0]

    @cached_property
    def strips(self) -> list[Strips]:
        """Of every point."""
        latents = self._latents[self.dim - 2]
        shares = split_sizes(latents, self.ranks)
        scales = [size[self.dim - 2] // latents for size in self.sizes]
        return [Strips(tuple(n * scale for n in shares), MARGIN) for scale in scales]

    @cached_property
    def fetched(self) -> list[tuple[int, int]]:
        """Rows before and after a strip that come from other ranks before each layer.

        None where the margins are right already: at first, since all ranks have the whole clip, and
        after rows were repeated, where of the two that were made of a margin the inner one is.
        With a stride of two the last tap of the last row meets the last row of the strip.
        """
        found, right = [], True
        for layer in self.layers:
            if layer.attends or layer.kernel == 1:
                found.append((0, 0))
                right = right and not layer.attends
                continue
            reach = 0 if right else layer.kernel // 2
            found.append((reach, reach if layer.stride[self.dim - 2] == 1 else 0))
            right = layer.factor[self.dim - 2] > 1
        return found

    def part_size(self, point: int, rank: int) -> Size:
        """(T, H, W) of a rank's own part of the map at a point."""
        size = list(self.sizes[point])
        size[self.dim - 2] = self.strips[point].sizes[rank]
        return size[0], size[1], size[2]

    def traffic(self, rank: int, itemsize: int) -> Traffic:
        """What a rank sends, with maps whose values have so many bytes.

        Rows to the ranks beside it; to all others the shape of what it was given, the statistics of
        its strip before each norm, its keys and values, and its part of the result.
        """
        found, batch, others = Traffic(), self.shape[0], self.ranks - 1

        def to_all(count: int) -> None:
            found.bytes["all_gather"] += count * others
            found.messages["all_gather"] += 1

        to_all(8 * len(self.shape))
        for index, layer in enumerate(self.layers):
            row = batch * layer.inputs * itemsize * prod(self.sizes[index])
            row //= self.sizes[index][self.dim - 2]
            for receiver in range(self.ranks):
                for sender, rows in self.strips[index].wanted(receiver, *self.fetched[index]):
                    if sender == rank:
                        found.bytes["halo"] += row * (rows[1] - rows[0])
                        found.messages["halo"] += 1
            if layer.norm:
                to_all(3 * batch * self.config.norm_num_groups * 8)
            if layer.attends:
                for _ in range(2):
                    to_all(batch * layer.inputs * itemsize * prod(self.part_size(index, rank)))
        last = self.layers[-1].outputs * prod(self.part_size(-1, rank))
        to_all(batch * last * itemsize)
        return found
