"""Blocks that go round a ring of processes, each on its way while the one before is in use."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup
from torch.profiler import record_function

from hunyuan_fast.distributed.traffic import sent

WAIT = "ring: wait"  # the name of waiting in profiles


class Transfer:
    """A message to the next process of a ring, and one from the process before, under way.

    Both are given to the backend at once: with NCCL, a send alone would wait for its receiver.
    What is empty is not sent. ``incoming`` has its values after ``wait``; ``outgoing`` must stay
    as it is until then.
    """

    def __init__(self, outgoing: Tensor, incoming: Tensor, group: ProcessGroup, tag: int) -> None:
        rank, ranks = group.rank(), group.size()
        self.outgoing, self.incoming = outgoing, incoming
        after = dist.get_global_rank(group, (rank + 1) % ranks)
        before = dist.get_global_rank(group, (rank - 1) % ranks)
        both = []
        if outgoing.numel():
            sent("ring", outgoing.numel() * outgoing.element_size())
            both.append(P2POp(dist.isend, outgoing, after, group, tag))
        if incoming.numel():
            both.append(P2POp(dist.irecv, incoming, before, group, tag))
        self._works = dist.batch_isend_irecv(both) if both else []

    def wait(self) -> Tensor:
        """What has come. On a GPU its stream waits, and the host goes on."""
        with record_function(WAIT):
            self.finish()
        return self.incoming

    def finish(self) -> None:
        """Wait for both messages: where a slower link can be put in its place."""
        for work in self._works:
            work.wait()


class Blocks:
    """Memory for what comes round: two blocks of the largest size that does.

    shapes: of the block of each process
    """

    def __init__(self, like: Tensor, shapes: list[tuple[int, ...]], rank: int) -> None:
        self._shapes = shapes
        others = [math.prod(shape) for owner, shape in enumerate(shapes) if owner != rank]
        count = min(2, len(others))
        self._memory = [like.new_empty(max(others)) for _ in range(count)]

    def place(self, owner: int, turn: int) -> Tensor:
        """A block like that of ``owner``, in the memory of even or odd turns."""
        shape = self._shapes[owner]
        return self._memory[turn % len(self._memory)][: math.prod(shape)].view(shape)


def rotate(
    own: Tensor, shapes: list[tuple[int, ...]], group: ProcessGroup, *, tag: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Every process's block with its owner, this one's first.

    The next block is under way before one is handed out; that one is valid until the next is asked
    for. Every block goes to the next process once, so that each process sends all but one.

    own: contiguous, left as it is    shapes: of the block of each process
    """
    rank, ranks = group.rank(), group.size()
    blocks = Blocks(own, shapes, rank) if ranks > 1 else None
    block = own
    for hop in range(ranks):
        owner = (rank - hop) % ranks
        if blocks is None or hop + 1 == ranks:
            yield owner, block
            return
        transfer = Transfer(block, blocks.place((owner - 1) % ranks, hop), group, tag)
        yield owner, block
        block = transfer.wait()
