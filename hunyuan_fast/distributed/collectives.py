"""Collectives for parts of any size, counted as traffic, without gradients.

With gradients, and for compilers, they are in ``hunyuan_fast.ops.collectives``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from hunyuan_fast.distributed.traffic import sent

Sizes = tuple[int, ...]


def size_of(group: ProcessGroup | None) -> int:
    """Processes in the group."""
    return 1 if group is None else group.size()


def rank_in(group: ProcessGroup | None) -> int:
    """Index of this process in the group."""
    return 0 if group is None else group.rank()


def group_named(name: Any) -> ProcessGroup:
    """The group of a name: that is what an operator, and a compiler, can be given."""
    return _resolve_process_group(name)


def broadcast(x: Tensor, source: int, group: ProcessGroup) -> Tensor:
    """What the rank `source` of the group has; there is no gradient.

    x: contiguous; elsewhere memory of the same shape and dtype, which is written to. What is
        counted, all of it at the source, is that every other process gets it once
    """
    if group.rank() == source:
        sent("broadcast", x.numel() * x.element_size() * (group.size() - 1))
    dist.broadcast(x, group=group, group_src=source)
    return x


def all_gather_parts(x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> Tensor:
    """All parts of a tensor, joined along ``dim`` in the order of the ranks; sizes: of each."""
    rows = _padded(x.movedim(dim, 0), max(sizes))
    sent("all_gather", x.numel() * x.element_size() * (len(sizes) - 1))
    everything = rows.new_empty((len(sizes), *rows.shape))
    dist.all_gather_into_tensor(everything.flatten(0, 1), rows, group)
    joined = [everything[rank, :size] for rank, size in enumerate(sizes)]
    whole = everything.flatten(0, 1) if len(set(sizes)) == 1 else torch.cat(joined)
    return whole.movedim(0, dim)


def reduce_scatter_parts(x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> Tensor:
    """The part of this process of the sum of all tensors; sizes: of the part of each rank."""
    rank, most = group.rank(), max(sizes)
    parts = x.movedim(dim, 0).split(sizes)
    sent("reduce_scatter", (x.numel() - parts[rank].numel()) * x.element_size())
    everything = torch.stack([_padded(rows, most) for rows in parts])
    mine = everything.new_empty(everything.shape[1:])
    dist.reduce_scatter_tensor(mine, everything.flatten(0, 1), group=group)
    return mine[: sizes[rank]].movedim(0, dim)


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all tensors, which stay as they are."""
    total = x.clone(memory_format=torch.contiguous_format)
    sent("all_reduce", 2 * (group.size() - 1) * total.numel() * x.element_size() // group.size())
    dist.all_reduce(total, group=group)
    return total


def all_to_all_parts(
    parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: ProcessGroup
) -> tuple[Tensor, ...]:
    """What each process has for this one, in the order of the ranks.

    parts: for each rank, of one dtype and any shapes
    shapes: of what comes from each rank
    """
    first, rank = parts[0], group.rank()
    own = parts[rank].numel()
    outgoing = [x.numel() for x in parts]
    incoming = [torch.Size(shape).numel() for shape in shapes]
    sent("all_to_all", (sum(outgoing) - own) * first.element_size())
    received = first.new_empty(sum(incoming))
    packed = torch.cat([x.flatten() for x in parts])
    dist.all_to_all_single(received, packed, incoming, outgoing, group=group)
    pieces = received.split(incoming)
    return tuple(x.view(shape) for x, shape in zip(pieces, shapes, strict=True))


def _padded(rows: Tensor, count: int) -> Tensor:
    """Contiguous rows, as many as ``count``: what collectives of one size for all can take."""
    if len(rows) == count:
        return rows.contiguous()
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded
