"""States in parts: trajectories of one process, and what each rank keeps and sends."""

from typing import Any

import pytest
import torch

from hunyuan_fast.distributed.mesh import Layout, build_mesh
from hunyuan_fast.models.dit.fully_sharded import shard_states
from tests.distributed import fully_sharded_cases as cases
from tests.kit.ranks import RankPool

# Sums of gradients in another order differ in their last bits; AdamW then divides by them.
CLOSE = {"output": 1e-5, "gradient": 1e-5, "norm": 1e-6, "weights": 1e-6}
EXACT = dict.fromkeys(CLOSE, 1e-12)
LAYOUTS = tuple(
    {"dp": dp, "zero": zero} for dp, zero in ((2, 0), (4, 0), (3, 1), (2, 2), (4, 2), (3, 3))
)
OFFLOADED = {"dp": 2, "zero": 3, "offload": True}
COMBINED = (
    {"dp": 2, "cp": 2},
    {"cp": 3, "zero": 3},
    {"cp": 2, "ulysses": 2, "tp": 2, "zero": 2},
    {"dp": 2, "tp": 2, "zero": 3},
)


def check(found: list[dict[str, float]], limits: dict[str, float]) -> None:
    for rank, errors in enumerate(found):
        for name, error in errors.items():
            assert error <= limits[name], f"{name} on rank {rank}: {error}"


@pytest.mark.parametrize("sizes", (*LAYOUTS, OFFLOADED), ids=str)
def test_the_trajectory_of_one_process(ranks: RankPool, sizes: dict[str, Any]) -> None:
    check(ranks.run(sizes["dp"], cases.compare, sizes), CLOSE)


@pytest.mark.parametrize("sizes", COMBINED, ids=str)
def test_with_shared_tokens_and_weights(ranks: RankPool, sizes: dict[str, Any]) -> None:
    count = Layout(**sizes).world_size
    check(ranks.run(count, cases.compare_with_heads, sizes), CLOSE)


@pytest.mark.parametrize("zero", (0, 3))
def test_checkpointing_in_float64(ranks: RankPool, zero: int) -> None:
    found = ranks.run(2, cases.compare_exactly, {"dp": 2, "zero": zero})
    check(found, EXACT)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_what_each_rank_keeps(ranks: RankPool, sizes: dict[str, Any]) -> None:
    whole = sum(p.nbytes for p in cases.transformer().parameters())
    found, ranks_of = ranks.run(sizes["dp"], cases.kept, sizes), sizes["dp"]
    everything = {"weights": whole, "gradients": whole, "moments": 2 * whole}
    divided = {0: (), 1: ("moments",), 2: everything, 3: everything}[sizes["zero"]]
    for name, size in everything.items():
        kept = [rank[name] for rank in found]
        assert sum(kept) == (size if name in divided else ranks_of * size)
        # rows of short tensors do not come out even
        assert max(kept) <= (1.02 * size / ranks_of if name in divided else size)


@pytest.mark.parametrize("sizes", ({"dp": 2, "zero": 2}, {"dp": 3, "zero": 3}), ids=str)
def test_what_is_gathered_and_scattered(ranks: RankPool, sizes: dict[str, Any]) -> None:
    for found in ranks.run(sizes["dp"], cases.passes, sizes):
        assert found["sent"] == found["wanted"]
        assert found["between"] == [sizes["zero"] == 2] * 2
        assert found["after"] == [False] * 2


@pytest.mark.parametrize("zero", (0, 1))
def test_what_is_averaged_and_broadcast(ranks: RankPool, zero: int) -> None:
    for found in ranks.run(3, cases.averaged, {"dp": 3, "zero": zero}):
        assert found["averaged"] == found["whole"]
        assert found["sent"] == (found["whole"] if zero == 1 else 0)


@pytest.mark.parametrize("offload", (False, True))
def test_inference_with_weights_in_parts(ranks: RankPool, offload: bool) -> None:
    for found in ranks.run(2, cases.infer, {"dp": 2, "zero": 3, "offload": offload}):
        assert found["same"]
        assert found["whole"] == [[True, False], [False, True]]
        assert found["after"] == [False] * 2
        # both ends, two blocks of the refiner, this block, and the one behind it on its way
        assert found["asked"] == [5, 5]


def test_weights_gathered_in_bfloat16(ranks: RankPool) -> None:
    for found in ranks.run(2, cases.in_bfloat16):
        assert found == {"same": True, "dtypes": {torch.float32}}


@pytest.mark.parametrize("zero", [2, 3])
def test_nothing_is_warned_of(ranks: RankPool, zero: int) -> None:
    assert ranks.run(2, cases.warned, {"dp": 2, "zero": zero}) == [[], []]


def refuse() -> None:
    layout = Layout(dp=2, zero=1)
    mesh = build_mesh(layout, "cpu")
    with pytest.raises(
        ValueError, match=r"param_dtype must go with zero = 2 or 3, got .* zero = 1"
    ):
        shard_states(cases.transformer(), mesh, layout, param_dtype=torch.bfloat16)


def test_a_dtype_that_nothing_is_gathered_in(ranks: RankPool) -> None:
    ranks.run(2, refuse)
