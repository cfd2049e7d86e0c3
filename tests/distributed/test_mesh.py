"""Layouts that no job can have are refused before it starts; the others become groups."""

from typing import Any

import pytest
from torch.distributed import get_process_group_ranks, get_rank

from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from tests.kit.ranks import RankPool

IMPOSSIBLE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"dp": 0}, "dp must be at least 1, got 0"),
    ({"cp": -1}, "cp must be at least 1, got -1"),
    ({"cp": 4, "ulysses": 3}, "ulysses must divide cp = 4, got 3"),
    ({"cp": 4, "ulysses": 0}, "ulysses must divide cp = 4, got 0"),
    ({"zero": 4}, "zero must be 0, 1, 2 or 3, got 4"),
    ({"offload": True, "zero": 2}, "offload must go with zero = 3, got zero = 2"),
)


@pytest.mark.parametrize(("sizes", "message"), IMPOSSIBLE)
def test_impossible_layouts(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**sizes)


def test_another_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"processes, 4, got 2 x 3 x 1 = 6; .*--nproc-per-node 6"):
        Layout(dp=2, cp=3).check_world(4)
    Layout(dp=2, cp=2).check_world(4)


def test_heads_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"tp must divide the 6 heads .* got 4; .*\[1, 2, 3, 6\]"):
        Layout(tp=4).check_heads(6)
    with pytest.raises(ValueError, match=r"ulysses must be at most the 3 heads .* got 4"):
        Layout(tp=2, cp=4, ulysses=4).check_heads(6)
    Layout(tp=2, cp=4, ulysses=2).check_heads(6)


def groups(sizes: dict[str, Any]) -> dict[str, list[int]]:
    """The ranks in the groups of this process."""
    mesh = build_mesh(Layout(**sizes), "cpu")
    names = ("dp", "ring", "ulysses", "tp", "cp", "data")
    found = {name: group_of(mesh, name) for name in names}
    return {
        name: [get_rank()] if group is None else get_process_group_ranks(group)
        for name, group in found.items()
    }


def test_groups_of_a_mesh(ranks: RankPool) -> None:
    first, second, third, last = ranks.run(4, groups, {"cp": 2, "tp": 2})
    assert first["dp"] == first["ulysses"] == [0]
    assert first["ring"] == first["cp"] == first["data"] == [0, 2] and first["tp"] == [0, 1]
    assert second["cp"] == [1, 3] and third["tp"] == [2, 3]
    assert last["data"] == [1, 3]

    found = ranks.run(4, groups, {"cp": 4, "ulysses": 2})
    assert [rank["ulysses"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["ring"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(rank["cp"] == [0, 1, 2, 3] for rank in found)

    found = ranks.run(4, groups, {"dp": 2, "cp": 2})
    assert [rank["dp"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(rank["data"] == [0, 1, 2, 3] for rank in found)
