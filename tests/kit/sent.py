"""What a process sends through torch's own collectives, by kind, as ``count_traffic`` counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_fast.distributed.traffic import Traffic

C10D = torch.ops.c10d


class _Watch(TorchDispatchMode):
    """Counts the operators that torch.distributed calls when Python asks for a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func.overloadpacket
        if packet is C10D._allgather_base_:
            whole, mine = args[0], args[1]
            self._note("all_gather", whole.nbytes - mine.nbytes)
        elif packet is C10D._reduce_scatter_base_:
            mine, whole = args[0], args[1]
            self._note("reduce_scatter", whole.nbytes - mine.nbytes)
        elif packet is C10D.broadcast_:
            self._note("broadcast", sum(x.nbytes for x in args[0]))
        elif packet is C10D.allreduce_:
            self._note("all_reduce", sum(x.nbytes for x in args[0]))
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, count: int) -> None:
        self.traffic.bytes[kind] += count
        self.traffic.messages[kind] += 1


@contextmanager
def watch_collectives() -> Iterator[Traffic]:
    """Count while the block runs.

    An all-reduce counts as its size, a broadcast on every rank: both leave open who sends how much.
    """
    watch = _Watch()
    with watch:
        yield watch.traffic


def padded_part(x: Tensor, ranks: int) -> int:
    """Bytes of the rows that each of so many ranks sends of a tensor parted along dim 0."""
    return -(-x.shape[0] // ranks) * ranks * x.nbytes // x.shape[0] // ranks
