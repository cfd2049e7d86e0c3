"""Attention that needs whole sequences, by processes that exchange heads: fp8 codes, windows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import group

from hunyuan_fast.distributed.mesh import Layout, build_mesh
from hunyuan_fast.distributed.shards import TokenShards
from hunyuan_fast.models.dit.parallel import parallelize
from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.ops import SlidingTiles, attention, fp8_attention
from hunyuan_fast.ops.context_attention import ulysses_attention, usp_attention
from tests.distributed import generate_cases
from tests.distributed.attention_cases import (
    NAMES,
    Sequence,
    largest_difference,
    on_this_rank,
    rows_of,
    whole,
)
from tests.distributed.test_context_parallel import assert_same, results
from tests.kit.numerics import assert_as_good_as
from tests.kit.ranks import RankPool
from tests.models.dit_cases import tiny_inputs, tiny_model

GRID, TILE = (3, 4, 5), (1, 2, 2)
# Of each head, and none like another: who takes the windows of the wrong head is noticed.
WINDOWS = ((1, 1, 3), (3, 2, 1), (2, 1, 1))
SPARSE = Sequence(60, 7, (7, 0))
LONG = Sequence(253, 9, (9, 2), head_dim=16)  # several blocks of codes, and a part of one


def pattern() -> SlidingTiles:
    return SlidingTiles(GRID, TILE, torch.tensor(WINDOWS, dtype=torch.int32))


def sparse_part(sequence: Sequence, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of this rank's tokens: the output and the gradients."""
    rank, shards = group.WORLD.rank(), shards_of(sequence, group.WORLD.size())
    options: dict[str, Any] = {"shards": shards, "kv_len": shards.kv_len(sequence.text_len)}
    attend = partial(ulysses_attention, **options, group=group.WORLD, pattern=pattern())
    return on_this_rank(sequence, dtype, shards, rank, attend)


def sparse_alone(sequence: Sequence, dtype: torch.dtype, compute: torch.dtype) -> dict[str, Tensor]:
    """Of all tokens, by one process."""
    *heads, dout = (x.to(compute) for x in sequence.draw(dtype))
    q, k, v = (x.requires_grad_() for x in heads)
    out = attention(q, k, v, kv_len=sequence.video + sequence.text_len, pattern=pattern())
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def shards_of(sequence: Sequence, ranks: int) -> TokenShards:
    return TokenShards.split(sequence.video, sequence.text, ranks)


@pytest.mark.parametrize("count", (2, 3))
def test_windows_of_each_head(ranks: RankPool, count: int) -> None:
    """Three heads: two processes have two and one."""
    for dtype, allowed in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = whole(ranks.run(count, sparse_part, SPARSE, dtype), shards_of(SPARSE, count))
        assert largest_difference(found, sparse_alone(SPARSE, dtype, torch.float64)) <= allowed
    half = torch.bfloat16
    found = whole(ranks.run(count, sparse_part, SPARSE, half), shards_of(SPARSE, count))
    exact, plain = (sparse_alone(SPARSE, half, compute) for compute in (torch.float64, half))
    for name in NAMES:
        assert_as_good_as(found[name], exact[name], plain[name], name=name)


def coded_part(dtype: torch.dtype) -> dict[str, Tensor]:
    """Of this rank's tokens, over codes."""
    rank, shards = group.WORLD.rank(), shards_of(LONG, group.WORLD.size())
    q, k, v, _ = (x[:, rows_of(shards, rank)] for x in LONG.draw(dtype))
    kv_len = shards.kv_len(LONG.text_len)
    out = ulysses_attention(q, k, v, shards=shards, kv_len=kv_len, group=group.WORLD, fp8=True)
    return dict.fromkeys(NAMES, out)


def coded_alone(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of all tokens by one process: over codes, and without."""
    q, k, v, _ = LONG.draw(dtype)
    kv_len = LONG.video + LONG.text_len
    exact = attention(q, k, v, kv_len=kv_len)
    assert isinstance(exact, Tensor)
    return fp8_attention(q, k, v, kv_len=kv_len), exact


def assert_same_codes(found: Tensor, one: Tensor, exact: Tensor) -> None:
    """As one process has it, but for sums of another order, and a code that they tip over.

    Other codes would be as far from those of one process as these are from exact numbers.
    """
    distance, cost = ((x - one).float().square().mean().sqrt() for x in (found, exact))
    assert cost > 0 and distance <= 0.1 * cost


@pytest.mark.parametrize("count", (2, 3))
def test_codes_are_those_of_one_process(ranks: RankPool, count: int) -> None:
    """A head has all of its tokens: the same means, blocks and scales."""
    for dtype in (torch.float32, torch.bfloat16):
        found = whole(ranks.run(count, coded_part, dtype), shards_of(LONG, count))["out"]
        assert_same_codes(found, *coded_alone(dtype))


def refused() -> list[str]:
    """What there is no attention for, by two processes in a ring and two that exchange."""
    rank, world = group.WORLD.rank(), group.WORLD
    shards = TokenShards.split(60, 4, 2)
    q = torch.zeros(1, shards.rows[rank], 3, 8)
    common = {"shards": shards, "kv_len": shards.kv_len(torch.tensor([4]))}
    by_heads, by_ring = {"ulysses": world, "ring": None}, {"ulysses": None, "ring": world}
    few = SlidingTiles(GRID, TILE, torch.ones(2, 3, dtype=torch.int32))
    calls: list[dict[str, Any]] = [
        {**by_ring, "fp8": True},
        {**by_ring, "pattern": pattern()},
        {**by_heads, "fp8": True, "pattern": pattern()},
        {**by_heads, "pattern": few},
        {**by_heads, "pattern": SlidingTiles(GRID, TILE, torch.arange(9).view(3, 3))},
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            usp_attention(q, q, q, **common, **call)
        messages.append(str(error.value))
    return messages


def test_refusals(ranks: RankPool) -> None:
    for in_ring, around, both, few, none in ranks.run(2, refused):
        assert "attention precision must be 'same' where tokens go round a ring" in in_ring
        assert "attention must be 'dense', without windows" in around and "ulysses = cp" in around
        assert "pattern must be None with fp8" in both
        assert "windows must be (N, 3) = (3, 3), got (2, 3)" in few
        assert "windows must be at least 1 tile" in none  # also who has the other heads says so


MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "uneven heads": (3, {"cp": 2, "ulysses": 2}),
    "with shared weights": (4, {"cp": 2, "ulysses": 2, "tp": 2}),
}


def of_model(heads: int, layout: dict[str, Any], kind: str, dtype: torch.dtype) -> Any:
    """A transformer's velocity (and gradients, with windows); by one process without a layout."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model(generator, hidden_size=24 * heads, heads_num=heads).to(dtype)
    inputs = tiny_inputs(generator, size=(3, 8, 10), text_lengths=(7, 0))
    weights = torch.randn(inputs["latents"].shape, generator=generator)
    if kind == "windows":
        chosen = (*WINDOWS, (1, 2, 2))[:heads]
        blocks = dict.fromkeys(model.attention_blocks(), chosen)
        windows = AttentionWindows(model="tiny", grid=GRID, tile=TILE, blocks=blocks)
        model.set_attention(windows=windows)
    if layout:
        parallelize(model, build_mesh(Layout(**layout), "cpu"), Layout(**layout))
    if kind == "windows" and "tp" not in layout:
        found = results(model, inputs, weights)
        for name, x in found.items() if layout else ():
            if name not in ("velocity", "inference"):
                torch.distributed.all_reduce(x)
                x /= group.WORLD.size()
        return found
    with torch.no_grad():
        if kind == "fp8":  # also where the tokens are shared already
            model.set_attention(precision="fp8")
        return {"velocity": model(**inputs)}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_windows(ranks: RankPool, name: str) -> None:
    heads, layout = MODELS[name]
    wanted = of_model(heads, {}, "windows", torch.float64)
    world = layout["cp"] * layout.get("tp", 1)
    for found in ranks.run(world, of_model, heads, layout, "windows", torch.float64):
        assert_same(found, {name: wanted[name] for name in found}, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_over_codes(ranks: RankPool, name: str) -> None:
    heads, layout = MODELS[name]
    world = layout["cp"] * layout.get("tp", 1)
    one, exact = (of_model(heads, {}, kind, torch.float32) for kind in ("fp8", "dense"))
    for found in ranks.run(world, of_model, heads, layout, "fp8", torch.float32):
        assert_same_codes(found["velocity"], one["velocity"], exact["velocity"])


REQUEST: dict[str, Any] = {"output_type": "latent"}
SHARED = {"cp": 2, "ulysses": 2}


def test_a_pipeline(ranks: RankPool) -> None:
    """Prompts in, latents out: windows as dense, codes as near as the steps leave them."""
    dense = generate_cases.alone(**REQUEST)
    for kind in ("windows", "fp8"):
        wanted = generate_cases.alone(kind, **REQUEST)
        first, second = ranks.run(2, generate_cases.together, SHARED, [REQUEST], kind)
        found = first["made"]
        assert second["made"].numel() == 0
        if kind == "fp8":
            assert_same_codes(found, wanted, dense)
        else:
            assert float((found - wanted).abs().max()) <= 1e-4 < float((wanted - dense).abs().max())
