"""Sliding-tile attention: every implementation against a mask, against each other, and dense."""

import itertools
from dataclasses import replace

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.sliding_tile_attention import reference, windows
from hunyuan_fast.ops import SlidingTiles, attention, sliding_tile_attention
from tests.kit import gpu
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import Fenced, far_apart
from tests.kit.numerics import assert_equal
from tests.ops.sliding_tile_attention_cases import (
    HALF,
    ROOM,
    answering,
    draw_call,
    emulation_of,
    first_tile,
    judge,
    masked,
    run,
    visible,
)

EVERYWHERE = answering(torch.bfloat16)
CASES = {
    "tiles that divide the grid": {"grid": (2, 4, 4), "windows": ((1, 1, 1), (1, 2, 1))},
    "partial tiles on all axes": {"grid": (3, 5, 4), "tile": (2, 3, 3)},
    "a grid smaller than a tile": {"grid": (1, 3, 2), "tile": (2, 4, 4), "windows": ((1, 1, 1),)},
    "no text": {"text": 0, "lengths": (18, 7), "head_dim": 20},
    "lengths in the text, in the video, none": {
        "lengths": (21, 18, 10, 0),
        "windows": ((1, 2, 1), (9, 9, 9)),
    },
    "three windows, heads of no tile": {
        "grid": (4, 2, 6),
        "windows": ((3, 1, 1), (1, 9, 3), (3, 1, 1)),
        "tile": (2, 1, 3),
        "head_dim": 24,
    },
    "tiles above a block": {"grid": (2, 12, 12), "tile": (1, 12, 12), "windows": ((1, 1, 1),)},
}

each_implementation = pytest.mark.parametrize("name", EVERYWHERE)
each_case = pytest.mark.parametrize("case", CASES)


@each_case
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for dtype in (torch.float32, *HALF)
        for name in answering(dtype)
        if (name, dtype) != ("triton_impl", torch.float16)
    ],
    ids=str,
)
def test_as_accurate_as_its_precision_allows(name, dtype, case, generator):
    call = draw_call(generator, dtype=dtype, **CASES[case])
    judge(name, run(name, call), call)


@each_case
@pytest.mark.parametrize("name", answering(torch.float64))
def test_formula_in_double_precision(name, case, generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 16)
    call = draw_call(generator, dtype=torch.float64, **CASES[case])
    for result, expected in zip(run(name, call), masked(call, torch.float64), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("lengths", [None, (9, 5)], ids=str)
@pytest.mark.parametrize("name", answering(torch.float64))
def test_gradcheck(name, lengths, generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    sizes = {"grid": (1, 2, 3), "tile": (1, 1, 2), "windows": ((1, 1, 1),), "text": 3}
    call = draw_call(generator, lengths=lengths, head_dim=2, dtype=torch.float64, **sizes)
    leaves = [x.requires_grad_() for x in call.tensors]
    with use(name, ROOM):
        assert torch.autograd.gradcheck(
            lambda *x: sliding_tile_attention(*x, **call.options), leaves
        )


@pytest.mark.parametrize("lengths", [None, (23, 19)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted({"cpu_impl", "library_impl"} & set(EVERYWHERE)))
def test_windows_as_large_as_the_grid_are_dense_attention(name, dtype, lengths, generator):
    """On the CPU the same kernel does the same work; its products depend on the alignment."""
    call = draw_call(generator, windows=((1, 2, 2), (9, 9, 9)), lengths=lengths, dtype=dtype)
    options = {"kv_len": call.kv_len, "scale": call.scale, "return_lse": True}
    with use(name):
        dense = attention(*call.tensors, **options)
        results = sliding_tile_attention(*call.tensors, **call.options, return_lse=True)
    for result, wanted in zip(results, dense, strict=True):
        torch.testing.assert_close(result, wanted)


@each_implementation
def test_a_head_that_sees_everything_beside_one_that_does_not(name, generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    out = run(name, call)[0]
    with use("reference"):
        dense = attention(*call.tensors, scale=call.scale)
    torch.testing.assert_close(out[:, :, 1], dense[:, :, 1], rtol=2**-7, atol=2**-9)
    assert (out[:, :18, 0] - dense[:, :18, 0]).abs().max() > 0.1
    torch.testing.assert_close(out[:, 18:], dense[:, 18:], rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("sharpness", [8.0, 0.01])
@each_implementation
def test_sharp_and_flat_scores(name, sharpness, generator):
    call = draw_call(generator, head_dim=64, dtype=torch.bfloat16)
    call = replace(call, q=call.q * sharpness)
    judge(name, run(name, call), call)


@each_implementation
def test_large_scores_do_not_overflow(name, generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    call = replace(call, q=call.q * 1e3, k=call.k * 1e3)
    assert all(x.isfinite().all() for x in run(name, call))


def test_implementations_agree_and_can_be_mixed(generator):
    """Forward by one, backward by another: outputs and log-sum-exp mean the same to all."""
    call = draw_call(generator, lengths=(21, 10), dtype=torch.bfloat16)
    modules = implementations(ROOM)
    forward = {name: modules[name].forward(*call.arguments) for name in EVERYWHERE}
    emulated = {name: emulation_of(name, call)(call) for name in EVERYWHERE}
    for first, second in itertools.product(EVERYWHERE, repeat=2):
        gradients = modules[second].backward(call.dout, *forward[first], *call.arguments)
        golden = [emulated[first][0], *emulated[second][1:]]
        results = [*forward[first], *gradients]
        judge(f"{first}, {second}", results, call, lambda _, golden=golden: golden)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in Triton's interpreter
@each_implementation
def test_padding_is_never_felt(name, generator):
    call = draw_call(generator, lengths=(21, 10, 0), dtype=torch.bfloat16)
    expected = run(name, call)
    spoiled = call.map(torch.clone)
    garbage = torch.nan, torch.inf, torch.nan, -torch.inf
    for x, bad in zip((*spoiled.tensors, spoiled.dout), garbage, strict=True):
        for item, length in enumerate(call.lengths):
            x[item, length:] = bad
    for result, wanted in zip(run(name, spoiled), expected, strict=True):
        assert_equal(result, wanted)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", sorted(set(EVERYWHERE) - {"reference"}))
def test_what_is_out_of_sight_has_no_influence(name, generator):
    """NaN in a key stays with the queries that see it, and in a query with the keys it sees.

    The reference multiplies by zero, which spreads NaN.
    """
    sizes = {"grid": (1, 3, 5), "windows": ((1, 1, 2),)}
    call = draw_call(generator, dtype=torch.bfloat16, **sizes)
    seen = visible(call)[0]
    spoiled = call.map(torch.clone)
    spoiled.v[0, 3] = torch.nan
    out, _, _, dk, _ = run(name, spoiled)
    assert torch.equal(out[0, :, 0].isnan().any(-1), seen[:, 3])
    spoiled = call.map(torch.clone)
    spoiled.q[0, 3] = torch.nan
    _, _, dq, dk, dv = run(name, spoiled)
    assert torch.equal(dk[0, :, 0].isnan().any(-1), seen[3])
    assert torch.equal(dv[0, :, 0].isnan().any(-1), seen[3])
    assert dq[0, :, 0].isnan().any(-1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("layout", LAYOUTS)
@each_implementation
def test_strides_do_not_matter(name, layout, generator):
    sizes = {"grid": (1, 2, 3), "lengths": (11, 4), "windows": ((1, 1, 1), (1, 1, 2))}
    call = draw_call(generator, dtype=torch.bfloat16, **sizes)
    strided = call.map(lambda x: with_layout(x, layout))
    expected = run(name, strided.map(torch.Tensor.contiguous))
    for result, wanted in zip(run(name, strided), expected, strict=True):
        # Not bit for bit: matrix products sum in an order that depends on the alignment.
        torch.testing.assert_close(result, wanted, rtol=2**-7, atol=2**-9)


def test_features_that_are_not_adjacent_go_to_those_who_take_them(generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    across = call.map(lambda x: x.mT.contiguous().mT)
    reasons = explain(ROOM, *across.arguments)
    assert "adjacent" in reasons["library_impl"]
    for name in set(EVERYWHERE) & {name for name, reason in reasons.items() if not reason}:
        for result, wanted in zip(run(name, across), run(name, call), strict=True):
            torch.testing.assert_close(result, wanted, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("stride", [(2**31 + 8, 32, 16, 1), (32, 2**30 + 8, 16, 1)], ids=str)
@each_implementation
def test_rows_and_samples_past_two_to_the_31(name, stride, generator):
    sizes = {"grid": (1, 1, 2), "tile": (1, 1, 1), "text": 1}
    lengths = (3, 2) if stride[0] > stride[1] else (3,)
    call = draw_call(generator, lengths=lengths, dtype=torch.bfloat16, **sizes)
    far = call.map(lambda x: far_apart(x.shape, stride).copy_(x))
    for result, wanted in zip(run(name, far), run(name, call), strict=True):
        torch.testing.assert_close(result, wanted, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("lengths", [None, (23, 10)], ids=str)
@each_implementation
def test_out_may_be_a_view_beside_other_results(name, lengths, generator):
    call = draw_call(generator, lengths=lengths, dtype=torch.bfloat16)
    batch, length, heads, head_dim = call.q.shape
    beside = Fenced((batch, length, heads * head_dim), torch.bfloat16, gap=40)
    view = beside.view.unflatten(-1, (heads, head_dim))
    with use(name, ROOM):
        expected, expected_lse = sliding_tile_attention(
            *call.tensors, **call.options, return_lse=True
        )
        result, lse = sliding_tile_attention(
            *call.tensors, **call.options, out=view, return_lse=True
        )
    assert result is view
    beside.check()
    assert_equal(view, expected)
    assert_equal(lse, expected_lse)


@each_implementation
def test_the_same_bits_at_every_run(name, generator):
    call = draw_call(generator, lengths=(21,), dtype=torch.bfloat16)
    for got, wanted in zip(run(name, call), run(name, call), strict=True):
        assert_equal(got, wanted)


@each_implementation
def test_memory_that_was_never_written_is_never_read(name, generator, poison):
    call = draw_call(generator, lengths=(10,), dtype=torch.bfloat16)
    assert not any(x.isnan().any() for x in run(name, call))


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("window", range(1, 9))
def test_all_tiles_see_equally_many(window, count):
    """Along one axis, with the host's arithmetic against the definition, tile by tile."""
    seen_by = {}
    for own, seen in windows.spans(count, 1, window):
        assert len(seen) == min(window, count)
        for i in own:
            assert seen.start == first_tile(i, min(window, count), count)
            assert i in seen
            seen_by[i] = seen
    assert sorted(seen_by) == list(range(count))


def test_pairs_are_counted_right(generator):
    call = draw_call(generator, grid=(3, 5, 4), tile=(2, 3, 3), windows=((1, 1, 2), (2, 1, 1)))
    for seen, window in zip(visible(call), call.windows.tolist(), strict=True):
        assert windows.pairs(call.grid, call.tile, window, text=5) == int(seen.sum())
        part = windows.fraction(call.grid, call.tile, window, text=5)
        assert part == int(seen.sum()) / 65**2
    assert windows.fraction((33, 45, 80), (6, 8, 8), (9, 9, 10), text=256) == 1


def test_attention_takes_the_pattern(generator):
    call = draw_call(generator, lengths=(21, 10), windows=((1, 1, 2), (1, 2, 1)))
    expected = sliding_tile_attention(*call.tensors, **call.options, return_lse=True)
    for given in (call.windows, call.windows.tolist(), tuple(map(tuple, call.windows.tolist()))):
        pattern = SlidingTiles(call.grid, call.tile, given)
        results = attention(*call.tensors, kv_len=call.kv_len, pattern=pattern, return_lse=True)
        for result, wanted in zip(results, expected, strict=True):
            assert_equal(result, wanted)
    out = torch.empty_like(call.q)
    assert attention(*call.tensors, kv_len=call.kv_len, pattern=pattern, out=out) is out
    assert_equal(out, expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [None, gpu.size((300, 260, 100, 0), (68, 50, 9, 0))], ids=str)
@pytest.mark.parametrize("name", implementations(ROOM))  # also those that take nothing on a CPU
def test_on_a_gpu(name, lengths, head_dim, dtype, generator):
    grid = gpu.size((5, 7, 8), (2, 4, 6))
    sizes = {"grid": grid, "tile": (2, 4, 4), "windows": ((1, 1, 1), (3, 1, 2), (9, 9, 9))}
    call = draw_call(
        generator, text=20, lengths=lengths, head_dim=head_dim, dtype=dtype, **sizes
    ).to("cuda")
    if reason := implementations(ROOM)[name].supports(*call.arguments):
        pytest.skip(reason)
    first = run(name, call)
    judge(name, list(first), call)
    gpu.assert_same_bits_at_every_run(lambda: run(name, call), gpu.FEW)
