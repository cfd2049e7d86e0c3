"""Tensors of several parts, each cut by itself."""

import pytest
import torch

from hunyuan_fast.distributed.cuts import Cut, Region

PARTS = (6, 6, 6, 7)


@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
@pytest.mark.parametrize("dim", (0, 1))
def test_there_and_back(ranks: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = sum(PARTS)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    cuts = [Cut(dim, PARTS, ranks, rank) for rank in range(ranks)]
    held = [cut.take(whole) for cut in cuts]
    assert tuple(x.shape[dim] for x in held) == cuts[0].sizes and sum(cuts[0].sizes) == sum(PARTS)
    assert torch.equal(cuts[-1].arrange(torch.cat(held, dim)), whole)
    for x, cut in zip(held, cuts, strict=True):
        assert torch.equal(Region(dim, cut.ranges(cut.rank)).of(whole), x)
        assert x.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_each_part_is_cut() -> None:
    assert Cut(0, PARTS, 2, 0).ranges(0) == ((0, 3), (6, 9), (12, 15), (18, 22))
    assert Cut(0, PARTS, 2, 0).ranges(1) == ((3, 6), (9, 12), (15, 18), (22, 25))
    assert Cut(0, PARTS, 2, 0).sizes == (13, 12)


@pytest.mark.parametrize("rank", (0, 1, 2))
@pytest.mark.parametrize("rows", ((0, 25), (6, 6), (4, 9), (18, 7)))
def test_what_is_held_of_some_rows(rank: int, rows: tuple[int, int]) -> None:
    start, count = rows
    whole = torch.arange(25)
    cut = Cut(0, PARTS, 3, rank)
    region, first = cut.of_rows(start, count)
    some = region.of(whole[start : start + count])
    held = cut.take(whole)
    assert torch.equal(held[first : first + len(some)], some)
    assert set(some.tolist()) == set(held.tolist()) & set(range(start, start + count))
    assert Cut(1, PARTS, 3, rank).of_rows(start, count) == (
        Region(1, cut.ranges(rank)),
        start,
    )
