"""Which part of a tensor each process holds: how a weight is cut, and how it is joined again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_fast.distributed.shards import part, split_sizes, starts

Range = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """What is wanted of a stored tensor: some ranges along one dim, joined."""

    dim: int
    ranges: tuple[Range, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The region of a tensor, in memory of its own."""
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return torch.cat(pieces, dim=self.dim)


@dataclass(frozen=True)
class Cut:
    """A piece of every one of some adjacent parts of a tensor.

    A layer that makes queries, keys and values at once has three parts: a process that computes
    some heads needs the rows of its heads from each of them.

    dim: along which the tensor is cut
    parts: sizes of the parts along dim, each cut into adjacent pieces by ``split_sizes``
    ranks, rank: how many share the tensor, and which of them this process is
    """

    dim: int
    parts: tuple[int, ...]
    ranks: int
    rank: int

    def ranges(self, rank: int) -> tuple[Range, ...]:
        """Where the piece of each part begins and ends, for one rank."""
        pieces = (part(split_sizes(size, self.ranks), rank) for size in self.parts)
        return tuple(
            (start + piece.start, start + piece.stop)
            for start, piece in zip(starts(self.parts), pieces, strict=True)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """What each rank holds along dim."""
        return tuple(
            sum(stop - start for start, stop in self.ranges(rank)) for rank in range(self.ranks)
        )

    def take(self, whole: Tensor) -> Tensor:
        """What this process holds of a whole tensor, in memory of its own."""
        return Region(self.dim, self.ranges(self.rank)).of(whole)

    def arrange(self, held: Tensor) -> Tensor:
        """The whole tensor, made of what all ranks hold, joined along dim in their order."""
        whole = torch.empty_like(held, memory_format=torch.contiguous_format)
        at = 0
        for rank in range(self.ranks):
            for start, stop in self.ranges(rank):
                rows = stop - start
                whole.narrow(self.dim, start, rows).copy_(held.narrow(self.dim, at, rows))
                at += rows
        return whole

    def of_rows(self, start: int, count: int) -> tuple[Region, int]:
        """What this process holds of some rows (along dim 0) of the whole tensor.

        Returns their region, counted from the first of these rows, and the row at which it begins
        in what this process holds.
        """
        ranges = self.ranges(self.rank)
        if self.dim != 0:
            return Region(self.dim, ranges), start
        inside = [(max(a, start) - start, min(b, start + count) - start) for a, b in ranges]
        before = sum(max(0, min(b, start) - a) for a, b in ranges)
        return Region(0, tuple((a, b) for a, b in inside if a < b)), before
