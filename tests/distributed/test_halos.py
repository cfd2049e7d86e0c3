"""Margins of strips: who sends which rows, and what comes where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hunyuan_fast.distributed.halos import Strips, exchange_margins
from hunyuan_fast.distributed.traffic import count_traffic
from tests.kit.ranks import RankPool


def test_own_and_held_rows() -> None:
    strips = Strips((3, 2, 1, 0), margin=2)
    assert [strips.own(rank) for rank in range(4)] == [(0, 3), (3, 5), (5, 6), (6, 6)]
    assert [strips.held(rank) for rank in range(4)] == [(0, 5), (1, 6), (3, 6), (6, 6)]
    x = torch.arange(5.0)
    assert strips.own_part(x, 1, 0).tolist() == [2, 3]


def test_rows_come_from_as_many_ranks_as_it_takes() -> None:
    strips = Strips((1, 1, 1, 3, 0), margin=3)
    assert list(strips.wanted(3, 2, 2)) == [(1, (1, 2)), (2, (2, 3))]
    assert list(strips.wanted(0, 3, 3)) == [(1, (1, 2)), (2, (2, 3)), (3, (3, 4))]
    assert list(strips.wanted(2, 0, 1)) == [(3, (3, 4))]
    assert list(strips.wanted(4, 3, 3)) == []


@pytest.mark.parametrize(("sizes", "margin"), [((), 0), ((2, -1), 0), ((2, 1), -1)])
def test_impossible_strips(sizes: tuple[int, ...], margin: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Strips(sizes, margin)


def exchanged(
    sizes: tuple[int, ...], margin: int, before: int, after: int, dim: int
) -> tuple[Any, ...]:
    """Whether every row is what it should be, and what was sent: rows, messages."""
    strips, rank = Strips(sizes, margin), dist.get_rank()
    shape = [2, 3, 4, 5, 6]
    shape[dim] = sum(sizes)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = whole.contiguous(memory_format=torch.channels_last_3d)
    (start, stop), (first, last) = strips.own(rank), strips.held(rank)
    x = torch.full_like(whole.narrow(dim, first, last - first), float("nan"))
    strips.own_part(x, rank, dim).copy_(whole.narrow(dim, start, stop - start))
    wanted = x.clone()
    for low, high in ((max(start - before, 0), start), (stop, min(stop + after, sum(sizes)))):
        if start < stop and low < high:
            wanted.narrow(dim, low - first, high - low).copy_(whole.narrow(dim, low, high - low))
    with count_traffic() as traffic:
        exchange_margins(x, strips, dist.group.WORLD, dim=dim, before=before, after=after).wait()
    same = torch.equal(x.nan_to_num(7.0), wanted.nan_to_num(7.0))
    row = whole.narrow(dim, 0, 1).numel() * 4
    return same, traffic.bytes["halo"] / row, traffic.messages["halo"]


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_margins_hold_what_the_neighbours_have(ranks: RankPool, dim: int) -> None:
    for sizes, margin, before, after, sends in (
        ((3, 2), 1, 1, 1, ((1, 1), (1, 1))),
        ((3, 2), 2, 1, 0, ((1, 1), (0, 0))),
        ((4, 1, 2), 1, 1, 1, ((1, 1), (2, 2), (1, 1))),
        ((3, 1, 1), 2, 2, 2, ((3, 2), (2, 2), (2, 2))),
        ((2, 1, 0), 1, 1, 1, ((1, 1), (1, 1), (0, 0))),
        ((1, 1, 1, 3), 3, 2, 3, ((2, 2), (3, 3), (3, 3), (6, 3))),
    ):
        found = ranks.run(len(sizes), exchanged, sizes, margin, before, after, dim)
        assert found == [(True, *sent) for sent in sends]


def refusals() -> list[str]:
    """What is said to rows, strips and widths that do not fit."""
    said = []
    for sizes, rows, before in (((2, 2), 2, 1), ((2, 2, 2), 3, 1), ((2, 2), 3, 2)):
        x, strips = torch.zeros(1, 1, rows, 1, 1), Strips(sizes, 1)
        try:
            exchange_margins(x, strips, dist.group.WORLD, dim=2, before=before, after=1)
        except ValueError as refused:
            said.append(str(refused))
    return said


def test_refusals(ranks: RankPool) -> None:
    for rank, said in enumerate(ranks.run(2, refusals)):
        assert said == [
            f"x must have 3 rows along dim 2 on rank {rank}, got (1, 1, 2, 1, 1)",
            "strips must have a size for each of 2 ranks, got (2, 2, 2)",
            "before and after must be at most the margin, 1, got 2 and 1",
        ]
