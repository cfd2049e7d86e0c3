"""What is written into may not share memory with what is read."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from hunyuan_fast.ops import (
    attention,
    fp8_attention,
    norm_rope_attention,
    sliding_tile_attention,
)
from hunyuan_fast.ops.memory import apart

TILES = {"grid": (2, 2, 2), "tile": (1, 2, 2), "windows": (1, 1, 1)}
OPS = {
    "attention": attention,
    "fp8_attention": fp8_attention,
    "sliding_tile_attention": lambda *tensors, out: sliding_tile_attention(
        *tensors, out=out, **TILES
    ),
}


def bytes_of(x: Tensor) -> set[int]:
    numbers = torch.arange(x.untyped_storage().size() // x.element_size())
    taken = numbers.as_strided(x.shape, x.stride(), x.storage_offset()).flatten().tolist()
    return {n * x.element_size() + byte for n in taken for byte in range(x.element_size())}


def view(buffer: Tensor, draw: random.Random) -> Tensor:
    """Some part of a buffer of 240 numbers, in rows of 12, 24 or 60, axes in any order."""
    x = buffer.view(-1, draw.choice([2, 3]), draw.choice([4, 8, 20]) // draw.choice([1, 2, 4]))
    for axis in range(3):
        start = draw.randrange(x.shape[axis])
        x = x.narrow(axis, start, draw.randint(1, x.shape[axis] - start))
    x = x[:: draw.choice([1, 1, 2])].permute(draw.sample(range(3), 3))
    return x[:0] if draw.random() < 0.05 else x


def test_views_said_to_be_apart_share_no_byte() -> None:
    draw, wrong, said = random.Random(0), 0, 0
    for _ in range(1500):
        buffers = torch.empty(240), torch.empty(240, dtype=torch.float64)
        a = view(buffers[0], draw)
        b = view(draw.choice([buffers[0], buffers[0], buffers[1]]), draw)
        shared = a.untyped_storage()._cdata == b.untyped_storage()._cdata and not bytes_of(
            a
        ).isdisjoint(bytes_of(b))
        if apart(a, b):
            said += 1
            assert not shared, (a.shape, a.stride(), a.storage_offset(), b)
        else:
            wrong += not shared
        assert apart(a, b) == apart(b, a)
    assert said > 500
    # what is called shared and is not: patterns without a common period
    assert wrong < 75


def test_columns_rows_and_other_storages_are_apart() -> None:
    buffer = torch.empty(2, 5, 24)
    parts = buffer.split((8, 8, 8), dim=-1)
    assert all(apart(a, b) for a in parts for b in parts if a is not b)
    assert apart(buffer[0], buffer[1]) and apart(buffer, torch.empty(2, 5, 24))
    assert not apart(buffer[..., :9], buffer[..., 8:]) and not apart(buffer, buffer)
    # the same memory, though each has a storage of its own
    array = buffer.numpy()
    assert not apart(torch.from_numpy(array), torch.from_numpy(array[:, 1:]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@torch.no_grad()
def test_attention_refuses_out_over_its_inputs(
    generator: torch.Generator, op: str, name: str
) -> None:
    rows = torch.randn(2, 9, 5, 4, 16, generator=generator)
    tensors = {"q": rows[:, :, 0], "k": rows[:, :, 1], "v": rows[:, :, 2]}
    given = rows.clone()
    for out in (tensors[name], rows[:, :, 2:].flatten(2, 3)[:, :, 1:5]):
        over = name if out is tensors[name] else "v"
        with pytest.raises(ValueError, match=rf"^out must share no memory with {over}, got views"):
            OPS[op](*tensors.values(), out=out)
    assert torch.equal(rows, given)
    beside = rows[:, :, 3]
    assert OPS[op](*tensors.values(), out=beside) is beside
    assert torch.equal(rows[:, :, :3], given[:, :, :3])


@torch.no_grad()
def test_attention_of_raw_rows_refuses_out_over_them(generator: torch.Generator) -> None:
    rows = torch.randn(1, 6, 4 * 32, generator=generator)
    text = torch.randn(1, 2, 3 * 32, generator=generator)
    weight, table = torch.ones(16), torch.ones(6, 16)
    options = {"num_heads": 2, "text_qkv": text, "text_q_weight": weight, "text_k_weight": weight}
    call = partial(
        norm_rope_attention, rows[..., : 3 * 32], weight, weight, table, table, **options
    )
    wide = torch.zeros(1, 8, 2, 16)
    over = torch.as_strided(rows, wide.shape, (8 * 32, 32, 16, 1), 3 * 32)
    with pytest.raises(ValueError, match=r"^out must share no memory with qkv, got views"):
        call(out=over)
    over = torch.as_strided(text, wide.shape, (0, 0, 16, 1))
    with pytest.raises(ValueError, match=r"^out must share no memory with text_qkv, got views"):
        call(out=over)
    assert call(out=wide) is wide


@torch.no_grad()
def test_one_graph_with_out(generator: torch.Generator) -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8, generator=generator)
    compiled = torch.compile(
        lambda q, k, v, out: attention(q, k, v, out=out), fullgraph=True, backend="aot_eager"
    )
    out = torch.empty_like(q)
    compiled(q, k, v, out)
    assert torch.equal(out, attention(q, k, v))
