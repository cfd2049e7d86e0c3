"""Maps that lie on the ranks in strips, and the rows that a strip needs of those beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.traffic import sent

Rows = tuple[int, int]  # from the first one to that behind the last


@dataclass(frozen=True)
class Strips:
    """Adjacent rows of a map on every rank, kept with a margin of the rows beside them.

    sizes: rows of each rank, in their order; there may be none
    margin: rows that are kept beyond those on either side, fewer where the map ends
    """

    sizes: tuple[int, ...]
    margin: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 0 or self.margin < 0:
            raise ValueError(
                f"sizes and margin must not be negative, and sizes one for each rank, "
                f"got {self.sizes} and {self.margin}"
            )

    def own(self, rank: int) -> Rows:
        """The rows that are this rank's own."""
        start = sum(self.sizes[:rank])
        return start, start + self.sizes[rank]

    def held(self, rank: int) -> Rows:
        """The same with their margins; a rank that has no rows holds no margin."""
        start, stop = self.own(rank)
        if start == stop:
            return start, stop
        return max(start - self.margin, 0), min(stop + self.margin, sum(self.sizes))

    def own_part(self, held: Tensor, rank: int, dim: int) -> Tensor:
        """Of a tensor with margins the rows that are the rank's own, as a view."""
        (start, stop), (first, _) = self.own(rank), self.held(rank)
        return held.narrow(dim, start - first, stop - start)

    def wanted(self, rank: int, before: int, after: int) -> Iterator[tuple[int, Rows]]:
        """Who has the rows before and after those of a rank: for each such rank, which of them.

        As many ranks as it takes, where strips are thinner than what is wanted.
        """
        start, stop = self.own(rank)
        if start == stop:
            return
        for sender in range(len(self.sizes)):
            first, last = self.own(sender)
            for low, high in ((start - before, start), (stop, stop + after)):
                rows = max(first, low), min(last, high)
                if rows[0] < rows[1]:
                    yield sender, rows


class Exchange:
    """Messages under way, which must be waited for before the margins are read."""

    def __init__(
        self, works: list[dist.Work], outgoing: list[Tensor], arriving: list[tuple[Tensor, Tensor]]
    ) -> None:
        self._works, self._arriving = works, arriving
        # what is being sent has to stay in memory
        self._outgoing = outgoing

    def wait(self) -> None:
        """Write what has come into the margins."""
        for work in self._works:
            work.wait()
        for margin, rows in self._arriving:
            margin.copy_(rows.movedim(-1, 1))
        self._works, self._outgoing, self._arriving = [], [], []


def exchange_margins(
    x: Tensor, strips: Strips, group: ProcessGroup, *, dim: int, before: int, after: int
) -> Exchange:
    """Begin to fill margins with the rows of other ranks, of which each is sent straight from its.

    x: (B, C, ...), the rows that `strips.held` says along dim, of one shape but for these on all
        ranks. The rank's own rows may be read until the exchange is over, nothing may be written
    before, after: rows to be filled on either side of its own, the nearest ones, at most the margin

    Where the map ends nothing comes. There is no gradient. Raises ValueError for x of another size
    and for more rows than the margin has.
    """
    rank = group.rank()
    low, high = strips.held(rank)
    if len(strips.sizes) != group.size():
        raise ValueError(
            f"strips must have a size for each of {group.size()} ranks, got {strips.sizes}"
        )
    if x.shape[dim] != high - low:
        raise ValueError(
            f"x must have {high - low} rows along dim {dim} on rank {rank}, got {tuple(x.shape)}"
        )
    if not (0 <= before <= strips.margin and 0 <= after <= strips.margin):
        raise ValueError(
            f"before and after must be at most the margin, {strips.margin}, "
            f"got {before} and {after}"
        )

    def place(rows: Rows) -> Tensor:
        return x.narrow(dim, rows[0] - low, rows[1] - rows[0])

    messages: list[dist.P2POp] = []
    outgoing: list[Tensor] = []
    arriving: list[tuple[Tensor, Tensor]] = []
    for receiver in range(len(strips.sizes)):
        for sender, rows in strips.wanted(receiver, before, after):
            if sender == rank:
                # as they lie in memory: features are adjacent
                packed = place(rows).movedim(1, -1).contiguous()
                outgoing.append(packed)
                peer = dist.get_global_rank(group, receiver)
                messages.append(dist.P2POp(dist.isend, packed, peer, group))
                sent("halo", packed.numel() * packed.element_size())
            elif receiver == rank:
                margin = place(rows)
                packed = x.new_empty(margin.movedim(1, -1).shape)
                arriving.append((margin, packed))
                peer = dist.get_global_rank(group, sender)
                messages.append(dist.P2POp(dist.irecv, packed, peer, group))
    works = dist.batch_isend_irecv(messages) if messages else []
    return Exchange(works, outgoing, arriving)
