"""Collectives with gradients, for parts of any size, counted as traffic.

Two readings of a value that several processes hold decide about gradients. Processes may have
losses of their own, whose sum is meant: then the gradient of a part is the sum of what all of them
have for it. Or they hold one value, replicated, and compute one loss from it: then its gradient is
replicated as well. Every function says which it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.shards import part
from hunyuan_fast.distributed.traffic import sent

Sizes = tuple[int, ...]


def size_of(group: ProcessGroup | None) -> int:
    """Processes in the group."""
    return 1 if group is None else group.size()


def rank_in(group: ProcessGroup | None) -> int:
    """Index of this process in the group."""
    return 0 if group is None else group.rank()


def gather(
    x: Tensor,
    sizes: Sizes,
    group: ProcessGroup | None,
    *,
    dim: int = 1,
    gradient: Literal["sum", "own"] = "sum",
) -> Tensor:
    """All parts of a tensor, joined along ``dim`` in the order of the ranks.

    sizes: of the part of each rank along dim
    gradient: "sum", of what all processes compute from the whole, be it with losses or with
        weights of their own; "own", the part of this process, where all compute the same from it
    """
    if group is None:
        return x
    _check_part(x, sizes, group, dim)
    return _Gather.apply(x, sizes, group, dim, gradient == "sum")


def split(x: Tensor, sizes: Sizes, group: ProcessGroup | None, *, dim: int = 1) -> Tensor:
    """The part of this process of a replicated tensor, whose gradient is gathered."""
    if group is None:
        return x
    _check_whole(x, sizes, group, dim)
    return _Split.apply(x, sizes, group, dim)


def reduce_scatter(x: Tensor, sizes: Sizes, group: ProcessGroup | None, *, dim: int = 1) -> Tensor:
    """The part of this process of the sum of all tensors; the gradient is gathered."""
    if group is None:
        return x
    _check_whole(x, sizes, group, dim)
    return _ReduceScatter.apply(x, sizes, group, dim)


def all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of all tensors, replicated; every summand has the gradient of the sum."""
    return x if group is None else _AllReduce.apply(x, group)


def shared(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A replicated tensor of which each process uses another part, or with other weights.

    It stays as it is; its gradient is the sum of those of all processes.
    """
    return x if group is None else _Shared.apply(x, group)


def all_to_all(
    parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: ProcessGroup | None
) -> list[Tensor]:
    """What each process has for this one, in the order of the ranks.

    parts: for each rank, of one dtype and any shapes
    shapes: of what comes from each rank
    """
    if group is None:
        return list(parts)
    if len(parts) != group.size() or len(shapes) != group.size():
        raise ValueError(
            f"parts and shapes must be given for each of {group.size()} ranks, "
            f"got {len(parts)} and {len(shapes)}"
        )
    return list(_AllToAll.apply(tuple(shapes), group, *parts))


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
    """:func:`gather` without gradients."""
    rows = _padded(x.movedim(dim, 0), max(sizes))
    sent("all_gather", x.numel() * x.element_size() * (len(sizes) - 1))
    everything = rows.new_empty((len(sizes), *rows.shape))
    dist.all_gather_into_tensor(everything.flatten(0, 1), rows, group)
    joined = [everything[rank, :size] for rank, size in enumerate(sizes)]
    whole = everything.flatten(0, 1) if len(set(sizes)) == 1 else torch.cat(joined)
    return whole.movedim(0, dim)


def reduce_scatter_parts(x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> Tensor:
    """:func:`reduce_scatter` without gradients."""
    rank, most = group.rank(), max(sizes)
    parts = x.movedim(dim, 0).split(sizes)
    sent("reduce_scatter", (x.numel() - parts[rank].numel()) * x.element_size())
    everything = torch.stack([_padded(rows, most) for rows in parts])
    mine = everything.new_empty(everything.shape[1:])
    dist.reduce_scatter_tensor(mine, everything.flatten(0, 1), group=group)
    return mine[: sizes[rank]].movedim(0, dim)


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """:func:`all_reduce` without gradients, of a tensor that stays as it is."""
    total = x.clone(memory_format=torch.contiguous_format)
    sent("all_reduce", 2 * (group.size() - 1) * total.numel() * x.element_size() // group.size())
    dist.all_reduce(total, group=group)
    return total


def all_to_all_parts(
    parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: ProcessGroup
) -> tuple[Tensor, ...]:
    """:func:`all_to_all` without gradients."""
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


def _check_part(x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> None:
    _check_count(sizes, group)
    if x.shape[dim] != sizes[group.rank()]:
        raise ValueError(
            f"x must have {sizes[group.rank()]} rows along dim {dim} on rank {group.rank()}, "
            f"got {tuple(x.shape)}"
        )


def _check_whole(x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> None:
    _check_count(sizes, group)
    if x.shape[dim] != sum(sizes):
        raise ValueError(
            f"x must have {sum(sizes)} rows along dim {dim}, those of all ranks, "
            f"got {tuple(x.shape)}"
        )


def _check_count(sizes: Sizes, group: ProcessGroup) -> None:
    if len(sizes) != group.size():
        raise ValueError(f"sizes must be {group.size()} numbers, one for each rank, got {sizes}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int, total: bool
    ) -> Tensor:
        ctx.taken = sizes, group, dim
        ctx.total = total
        return all_gather_parts(x, sizes, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sizes, group, dim = ctx.taken
        if ctx.total:
            return reduce_scatter_parts(grad, sizes, group, dim), None, None, None, None
        mine = part(sizes, group.rank())
        return grad.narrow(dim, mine.start, mine.stop - mine.start), None, None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> Tensor:
        ctx.taken = sizes, group, dim
        mine = part(sizes, group.rank())
        return x.narrow(dim, mine.start, mine.stop - mine.start).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return all_gather_parts(grad, *ctx.taken), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sizes, group: ProcessGroup, dim: int) -> Tensor:
        ctx.taken = sizes, group, dim
        return reduce_scatter_parts(x, sizes, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return all_gather_parts(grad, *ctx.taken), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return all_reduce_sum(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shapes: tuple[tuple[int, ...], ...], group: ProcessGroup, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.outgoing = [tuple(x.shape) for x in parts]
        return all_to_all_parts(parts, shapes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *all_to_all_parts(grads, ctx.outgoing, ctx.group)
