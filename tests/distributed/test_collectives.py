"""Collectives against what one process computes, their gradients, and what they count."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import group

from hunyuan_fast.distributed.collectives import all_to_all_parts
from hunyuan_fast.distributed.shards import part, split_sizes
from hunyuan_fast.distributed.traffic import count_traffic
from hunyuan_fast.ops.collectives import all_reduce, gather, reduce_scatter, shared, split
from tests.kit.ranks import RankFailed, RankPool

ROWS = 7  # 2 and 4 ranks divide nothing here, 4 ranks leave parts of two sizes


def whole(seed: int, *shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_gather(gradient: Any, dim: int) -> dict[str, Tensor]:
    """Gather parts, weigh the whole by numbers of the rank, and take the gradient of the part."""
    ranks, rank = group.WORLD.size(), group.WORLD.rank()
    shape = [2, 3, 4]
    shape[dim] = ROWS
    sizes, x = split_sizes(ROWS, ranks), whole(0, *shape)
    mine = x.movedim(dim, 0)[part(sizes, rank)].movedim(0, dim).requires_grad_()
    weights = whole(1, *shape) if gradient == "own" else whole(10 + rank, *shape)
    with count_traffic() as traffic:
        joined = gather(mine, sizes, group.WORLD, dim=dim, gradient=gradient)
    (joined * weights).sum().backward()
    total = weights if gradient == "own" else sum(whole(10 + r, *shape) for r in range(ranks))
    wanted = total.movedim(dim, 0)[part(sizes, rank)].movedim(0, dim)
    counted = torch.tensor([traffic.total, mine.numel() * 8 * (ranks - 1)])
    return {"whole": joined - x, "gradient": mine.grad - wanted, "bytes": counted.diff()}


def of_others(dim: int) -> dict[str, Tensor]:
    """Splits, sums and both together, and their gradients."""
    ranks, rank = group.WORLD.size(), group.WORLD.rank()
    shape = [2, 3, 4]
    shape[dim] = ROWS
    sizes = split_sizes(ROWS, ranks)

    def own(x: Tensor) -> Tensor:
        return x.movedim(dim, 0)[part(sizes, rank)].movedim(0, dim)

    one, weights = whole(0, *shape), whole(1, *shape)
    replicated = one.clone().requires_grad_()
    mine = split(replicated, sizes, group.WORLD, dim=dim)
    (mine * own(weights)).sum().backward()
    found = {"split": mine - own(one), "split gradient": replicated.grad - weights}

    summand = whole(2 + rank, *shape).requires_grad_()
    everything = sum(whole(2 + r, *shape) for r in range(ranks))
    mine = reduce_scatter(summand, sizes, group.WORLD, dim=dim)
    (mine * own(weights)).sum().backward()
    found["scatter"] = mine - own(everything)
    found["scatter gradient"] = summand.grad - weights

    summand.grad = None
    total = all_reduce(summand, group.WORLD)
    (total * weights).sum().backward()
    found["reduce"] = total - everything
    found["reduce gradient"] = summand.grad - weights

    replicated.grad = None
    (shared(replicated, group.WORLD) * summand.detach()).sum().backward()
    found["shared gradient"] = replicated.grad - everything
    return found


def of_all_to_all() -> dict[str, Tensor]:
    """Every rank sends (sender + 1, receiver) numbers to every other."""
    ranks, rank = group.WORLD.size(), group.WORLD.rank()

    def message(sender: int, receiver: int) -> Tensor:
        return whole(10 * sender + receiver, sender + 1, receiver)

    parts = [message(rank, receiver) for receiver in range(ranks)]
    shapes = [(sender + 1, rank) for sender in range(ranks)]
    with count_traffic() as traffic:
        received = all_to_all_parts(parts, shapes, group.WORLD)
    found = {f"from {sender}": x - message(sender, rank) for sender, x in enumerate(received)}
    others = sum(x.numel() for r, x in enumerate(parts) if r != rank)
    found["bytes"] = torch.tensor([traffic.bytes["all_to_all"] - 8 * others])
    return found


def fail_on_the_last() -> None:
    if group.WORLD.rank() == group.WORLD.size() - 1:
        raise ValueError("on purpose")


def check(results: list[dict[str, Tensor]]) -> None:
    """Differences of all ranks: float64 sums of a few numbers may differ in their last bits."""
    for rank, found in enumerate(results):
        for name, difference in found.items():
            error = difference.abs().amax().item() if difference.numel() else 0.0
            assert error <= 1e-14, f"{name} on rank {rank}: {error}"


@pytest.mark.parametrize("ranks_of", (1, 2, 3, 4))
@pytest.mark.parametrize("gradient", ("sum", "own"))
def test_gather(ranks: RankPool, ranks_of: int, gradient: str) -> None:
    for dim in (0, 1, 2):
        check(ranks.run(ranks_of, of_gather, gradient, dim))


@pytest.mark.parametrize("ranks_of", (2, 3, 4))
def test_others(ranks: RankPool, ranks_of: int) -> None:
    for dim in (0, 1, 2):
        check(ranks.run(ranks_of, of_others, dim))


@pytest.mark.parametrize("ranks_of", (2, 3, 4))
def test_all_to_all(ranks: RankPool, ranks_of: int) -> None:
    check(ranks.run(ranks_of, of_all_to_all))


def test_a_group_of_one_sends_nothing() -> None:
    x = whole(0, 2, 3)
    with count_traffic() as traffic:
        assert gather(x, (3,), None) is x
        assert split(x, (3,), None) is x
        assert reduce_scatter(x, (3,), None) is x
        assert all_reduce(x, None) is x
        assert shared(x, None) is x
    assert not traffic.total


def test_a_failure_names_its_rank(ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match=r"rank 1 of 2 failed[^$]*on purpose"):
        ranks.run(2, fail_on_the_last, timeout=20)
    check(ranks.run(2, of_gather, "sum", 0))
