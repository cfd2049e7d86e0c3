"""Collectives with gradients, for parts of any size, which compilers take as they are.

Two readings of a value that several processes hold decide about gradients. Processes may have
losses of their own, whose sum is meant: then the gradient of a part is the sum of what all of them
have for it. Or they hold one value, replicated, and compute one loss from it: then its gradient is
replicated as well. Every function says which it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.collectives import (
    Sizes,
    all_gather_parts,
    all_reduce_sum,
    group_named,
    reduce_scatter_parts,
)
from hunyuan_fast.distributed.shards import part
from hunyuan_fast.ops.operator import define


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
    return _gather(x, sizes, dim, gradient == "sum", group.group_name)


def split(x: Tensor, sizes: Sizes, group: ProcessGroup | None, *, dim: int = 1) -> Tensor:
    """The part of this process of a replicated tensor, whose gradient is gathered."""
    if group is None:
        return x
    _check_whole(x, sizes, group, dim)
    return _split(x, sizes, dim, group.group_name)


def reduce_scatter(x: Tensor, sizes: Sizes, group: ProcessGroup | None, *, dim: int = 1) -> Tensor:
    """The part of this process of the sum of all tensors; the gradient is gathered."""
    if group is None:
        return x
    _check_whole(x, sizes, group, dim)
    return _reduce_scatter(x, sizes, dim, group.group_name)


def all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of all tensors, replicated; every summand has the gradient of the sum."""
    return x if group is None else _all_reduce(x, group.group_name)


def shared(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A replicated tensor of which each process uses another part, or with other weights.

    It stays as it is; its gradient is the sum of those of all processes.
    """
    return x if group is None else _Shared.apply(x, group.group_name)


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


def _gather_kernel(x: Tensor, sizes: Sequence[int], dim: int, total: bool, name: str) -> Tensor:
    return all_gather_parts(x, tuple(sizes), group_named(name), dim)


def _fake_gather(x: Tensor, sizes: Sequence[int], dim: int, *_: Any) -> Tensor:
    return _fake_rows(x, sum(sizes), dim)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, sizes, dim, ctx.total, name = inputs
    ctx.taken = tuple(sizes), dim, name


def _gather_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    own = _reduce_scatter if ctx.total else _split
    return own(grad, *ctx.taken), None, None, None, None


def _split_kernel(x: Tensor, sizes: Sequence[int], dim: int, name: str) -> Tensor:
    mine = part(tuple(sizes), group_named(name).rank())
    rows = x.narrow(dim, mine.start, mine.stop - mine.start)
    return rows.clone(memory_format=torch.contiguous_format)


def _fake_split(x: Tensor, sizes: Sequence[int], dim: int, name: str) -> Tensor:
    return x.new_empty(_fake_rows(x, sizes[group_named(name).rank()], dim).shape)


def _reduce_scatter_kernel(x: Tensor, sizes: Sequence[int], dim: int, name: str) -> Tensor:
    return reduce_scatter_parts(x, tuple(sizes), group_named(name), dim)


def _fake_reduce_scatter(x: Tensor, sizes: Sequence[int], dim: int, name: str) -> Tensor:
    return _fake_rows(x, sizes[group_named(name).rank()], dim)


def _save_whole(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, sizes, dim, name = inputs
    ctx.taken = tuple(sizes), dim, name


def _split_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    sizes, dim, name = ctx.taken
    return _gather(grad, sizes, dim, False, name), None, None, None


def _reduce_scatter_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    sizes, dim, name = ctx.taken
    return _gather(grad, sizes, dim, True, name), None, None, None


def _all_reduce_kernel(x: Tensor, name: str) -> Tensor:
    return all_reduce_sum(x, group_named(name))


def _fake_all_reduce(x: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape)


def _same_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None


def _fake_rows(x: Tensor, rows: int, dim: int) -> Tensor:
    """Like x with so many rows along dim, as collectives leave it: dim is the slowest in memory."""
    others = x.movedim(dim, 0).shape[1:]
    return x.new_empty((rows, *others)).movedim(0, dim)


class _Shared(torch.autograd.Function):
    """No operator: it would have to copy what stays as it is. Compilers look into this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _all_reduce(grad, ctx.name), None


_gather = define(
    "gather_parts(Tensor x, SymInt[] sizes, int dim, bool total, str group) -> Tensor",
    _gather_kernel,
    _fake_gather,
    save=_save_gather,
    gradients=_gather_gradients,
)
_split = define(
    "split_parts(Tensor x, SymInt[] sizes, int dim, str group) -> Tensor",
    _split_kernel,
    _fake_split,
    save=_save_whole,
    gradients=_split_gradients,
)
_reduce_scatter = define(
    "reduce_scatter_parts(Tensor x, SymInt[] sizes, int dim, str group) -> Tensor",
    _reduce_scatter_kernel,
    _fake_reduce_scatter,
    save=_save_whole,
    gradients=_reduce_scatter_gradients,
)
_all_reduce = define(
    "all_reduce_sum(Tensor x, str group) -> Tensor",
    _all_reduce_kernel,
    _fake_all_reduce,
    gradients=_same_gradient,
)
