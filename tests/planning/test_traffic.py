"""The formulas of traffic, against schemes played through message by message."""

import pytest

from hunyuan_fast.planning import traffic

HEADS, DIM, BYTES, BATCH = 5, 8, 2, 2
ROWS = [[4], [4, 4], [5, 4, 4], [3, 0, 7, 1]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_ring_played_through(rows: list[int], backward: bool) -> None:
    ranks = len(rows)
    row = BATCH * HEADS * DIM
    sent, messages = [0] * ranks, [0] * ranks
    for rank in range(ranks) if ranks > 1 else ():
        for hop in range(ranks - 1):  # first our own, then what came before
            sent[rank] += 2 * rows[(rank - hop) % ranks] * row * BYTES
            messages[rank] += 1
        for hop in range(1, ranks) if backward else ():  # of what has come; its owner keeps its own
            sent[rank] += 2 * rows[(rank - hop) % ranks] * row * 4
            messages[rank] += 1
    for rank in range(ranks):
        args = (BATCH, rows, HEADS, DIM, BYTES, ranks, backward)
        assert traffic.ring_attention_bytes(*args, rank=rank) == sent[rank]
        assert traffic.ring_attention_messages(ranks, backward) == messages[rank]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backward", [False, True])
def test_heads_for_tokens_played_through(rows: list[int], backward: bool) -> None:
    ranks = len(rows)
    heads = [HEADS // ranks + (rank < HEADS % ranks) for rank in range(ranks)]
    for rank in range(ranks):
        others = [other for other in range(ranks) if other != rank]
        out = sum(rows[rank] * heads[other] for other in others)
        back = sum(rows[other] * heads[rank] for other in others)
        tensors = out + 3 * back if backward else 3 * out + back
        args = (BATCH, rows, HEADS, DIM, BYTES, ranks, backward)
        assert traffic.ulysses_bytes(*args, rank=rank) == tensors * BATCH * DIM * BYTES


def test_one_number_stands_for_equal_rows() -> None:
    for formula in (traffic.ring_attention_bytes, traffic.ulysses_bytes):
        one = formula(1, 6, 4, 8, 2, 3, True)
        assert one == formula(1, [6, 6, 6], 4, 8, 2, 3, True) > 0


def test_rows_for_another_number_of_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="rows_per_rank must be one number or 3 of them, got 2"):
        traffic.ring_attention_bytes(1, [6, 6], 4, 8, 2, 3, False)


def test_an_all_reduce_is_a_scatter_and_a_gather() -> None:
    assert traffic.all_reduce_bytes(1200, 4) == 1800
    both = traffic.reduce_scatter_bytes(1200, 4) + traffic.all_gather_bytes(1200, 4)
    assert traffic.all_reduce_bytes(1200, 4) == both
    for name in ("all_reduce_bytes", "all_gather_bytes", "reduce_scatter_bytes"):
        assert getattr(traffic, name)(1200, 1) == 0


def test_tensor_parallelism_reduces_twice_in_double_blocks_and_once_in_single_ones() -> None:
    single = traffic.tensor_parallel_bytes(1, 10, 64, 2, 2, "single")
    assert single == 10 * 64 * 2  # 2 (p - 1) / p of the tokens
    assert traffic.tensor_parallel_bytes(1, 10, 64, 2, 2, "double") == 2 * single


def test_sharded_weights_and_halos() -> None:
    assert traffic.fsdp_gather_bytes(1000, 2, 4) == 1500
    assert traffic.fsdp_reduce_bytes(1000, 4, 4) == 3000
    assert traffic.halo_bytes(1, 8, 3, 20, 1, 2) == 8 * 3 * 20 * 2
    assert traffic.ulysses_messages(1) == 0 and traffic.ulysses_messages(3) == 2
