"""What one process of a group has, for all of them: without gradients, counted as traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.collectives import Sizes, rank_in, size_of
from hunyuan_fast.distributed.shards import part
from hunyuan_fast.distributed.traffic import sent

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process has failed at what this one waits for."""


def from_first(make: Callable[[], T], group: ProcessGroup | None) -> T:
    """What ``make`` returns on the first rank, on all ranks.

    It may hold anything that can be pickled, apart from tensors. An exception there is raised
    there, and PeerError with its words on the others, so that nobody waits for what never comes.
    """
    if group is None:
        return make()
    if rank_in(group) == 0:
        try:
            value = make()
        except Exception as error:
            _object((type(error).__name__, str(error)), group)
            raise
        _object((None, value), group)
        return value
    failed, value = _object(None, group)
    if failed:
        raise PeerError(f"rank {_first(group)} has failed: {failed}: {value}")
    return value


def tensor_from_first(x: Tensor | None, group: ProcessGroup | None, device: torch.device) -> Tensor:
    """The tensor of the first rank on all ranks, bit for bit, on ``device``.

    x: there, of any shape and dtype; elsewhere it is not looked at
    """
    if rank_in(group) == 0:
        assert x is not None, "the first rank has the tensor"
        here = x.to(device).contiguous()
        if group is None:
            return here
        from_first(lambda: (tuple(here.shape), here.dtype), group)
        sent("broadcast", here.numel() * here.element_size())
    else:
        assert group is not None
        shape, dtype = from_first(lambda: ((0,), torch.uint8), group)
        here = torch.empty(shape, dtype=dtype, device=device)
    # as bytes: not every backend knows every dtype
    dist.broadcast(here.view(-1).view(torch.uint8), _first(group), group=group)
    return here


def to_first(x: Tensor, sizes: Sizes, group: ProcessGroup | None) -> Tensor:
    """All parts of a tensor along dim 0 in the order of the ranks, on the first rank; else none.

    x: alike on all ranks apart from dim 0, of which each has as many rows as ``sizes`` tells
    """
    if group is None:
        return x
    rank = rank_in(group)
    if len(sizes) != size_of(group) or len(x) != sizes[rank]:
        raise ValueError(
            f"sizes must be the rows of {size_of(group)} ranks and {len(x)} on rank {rank}, "
            f"got {sizes}"
        )
    if rank:
        sent("send", x.numel() * x.element_size())
        dist.send(x.contiguous(), _first(group), group=group)
        return x[:0]
    whole = x.new_empty((sum(sizes), *x.shape[1:]))
    whole[part(sizes, 0)] = x
    for other in range(1, len(sizes)):
        dist.recv(whole[part(sizes, other)], dist.get_global_rank(group, other), group=group)
    return whole


def _object(value: Any, group: ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, _first(group), group=group)
    return box[0]


def _first(group: ProcessGroup) -> int:
    return dist.get_global_rank(group, 0)
