"""Attention over the tokens of several processes against one: ring, exchanged heads, and both."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import group

from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.distributed.shards import TokenShards
from hunyuan_fast.ops.context_attention import ulysses_attention, usp_attention
from hunyuan_fast.ops.ring_attention import ring_attention
from tests.distributed.attention_cases import (
    SEQUENCES,
    Sequence,
    assert_as_one_process,
    on_this_rank,
    whole,
)
from tests.kit.ranks import RankPool

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def of_ring(sequence: Sequence, dtype: torch.dtype) -> dict[str, Tensor]:
    """Around a ring of all processes."""
    rank, ranks = group.WORLD.rank(), group.WORLD.size()
    shards = TokenShards.split(sequence.video, sequence.text, ranks)
    options: dict[str, Any] = {"lengths": shards.rows, "group": group.WORLD}
    attend = partial(ring_attention, kv_len=shards.kv_len(sequence.text_len), **options)
    return on_this_rank(sequence, dtype, shards, rank, attend)


def of_ulysses(sequence: Sequence, dtype: torch.dtype) -> dict[str, Tensor]:
    """By exchange among all processes."""
    rank, ranks = group.WORLD.rank(), group.WORLD.size()
    shards = TokenShards.split(sequence.video, sequence.text, ranks)
    options: dict[str, Any] = {"shards": shards, "group": group.WORLD}
    attend = partial(ulysses_attention, kv_len=shards.kv_len(sequence.text_len), **options)
    return on_this_rank(sequence, dtype, shards, rank, attend)


def of_usp(sequence: Sequence, dtype: torch.dtype) -> dict[str, Tensor]:
    """By exchange between neighbours, and around two rings of two."""
    mesh = build_mesh(Layout(cp=4, ulysses=2), "cpu")
    rank, shards = group.WORLD.rank(), TokenShards.split(sequence.video, sequence.text, 4)
    groups: dict[str, Any] = {name: group_of(mesh, name) for name in ("ulysses", "ring")}
    kv_len = shards.kv_len(sequence.text_len)
    attend = partial(usp_attention, shards=shards, kv_len=kv_len, **groups)
    return on_this_rank(sequence, dtype, shards, rank, attend)


SCHEMES = {
    **{f"ring of {ranks}": (of_ring, ranks) for ranks in (1, 2, 3, 4)},
    **{f"ulysses of {ranks}": (of_ulysses, ranks) for ranks in (2, 3)},
    "usp of 2 x 2": (of_usp, 4),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SEQUENCES)
def test_as_one_process(ranks: RankPool, scheme: str, name: str) -> None:
    function, count = SCHEMES[scheme]
    sequence = SEQUENCES[name]
    shards = TokenShards.split(sequence.video, sequence.text, count)
    for dtype in DTYPES:
        found = ranks.run(count, function, sequence, dtype)
        assert_as_one_process(whole(found, shards), sequence, dtype)
