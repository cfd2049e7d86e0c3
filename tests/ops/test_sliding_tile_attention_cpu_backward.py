"""Gradients of sliding-tile attention in C++: chunks, tiles, threads, and memory left alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import explain, implementations
from hunyuan_fast.kernels.sliding_tile_attention.windows import fraction
from tests.kit.memory import Fenced, poisoned_memory
from tests.kit.numerics import assert_equal
from tests.ops.sliding_tile_attention_cases import Call, draw_call, judge, masked, run

ROOM = "sliding_tile_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

if "cpu_impl" not in implementations(ROOM):
    said = explain(ROOM, *draw_call(torch.Generator()).arguments)["cpu_impl"]
    pytest.skip(said, allow_module_level=True)

cpu_impl = implementations(ROOM)["cpu_impl"]
native = cpu_impl._C

CASES = {
    # eight segments in a chunk, then more; tiles of fewer queries than a group of rows
    "many small tiles": {"grid": (2, 6, 10), "tile": (1, 2, 2), "windows": ((1, 3, 2), (2, 1, 1))},
    # keys that the same queries see fill several chunks, and queries several tiles
    "tiles above a chunk": {
        "grid": (2, 10, 24),
        "tile": (2, 10, 12),
        "windows": ((1, 1, 1), (1, 1, 2)),
        "text": 3,
    },
    "much text": {"grid": (1, 4, 5), "windows": ((1, 1, 2), (1, 1, 1)), "text": 230},
    "lengths between tiles and in the text": {
        "grid": (3, 5, 4),
        "tile": (2, 3, 3),
        "windows": ((1, 1, 1), (1, 2, 1)),
        "lengths": (65, 61, 33, 1, 0),
    },
    # wide heads: chunks and tiles of a group of rows
    "a wide head": {"grid": (2, 4, 7), "tile": (2, 3, 3), "head_dim": 530, "lengths": (61, 40)},
}


def gradients(call: Call) -> list[Tensor]:
    """dq, dk, dv of the module itself, from its own forward."""
    out, lse = cpu_impl.forward(*call.arguments)
    return list(cpu_impl.backward(call.dout, out, lse, *call.arguments))


@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_its_precision_allows(case, dtype, generator):
    call = draw_call(generator, dtype=dtype, **CASES[case])
    judge("cpu_impl", run("cpu_impl", call), call)


@pytest.mark.parametrize("axis", range(3))
def test_every_window_on_every_axis(axis, generator):
    """Who sees a tile is not what it sees: windows of even size, and borders."""
    for count, text in itertools.product((1, 2, 5), (0, 2)):
        sizes, tile, *windows = ([1, 1, 1] for _ in range(2 + count))
        sizes[axis], tile[axis] = 2 * count - count // 2, 2 - (count > 1) * (count % 2 == 0)
        for i, window in enumerate(windows):
            window[axis] = i + 1
        call = draw_call(
            generator,
            grid=tuple(sizes),
            tile=tuple(tile),
            windows=tuple(map(tuple, windows)),
            text=text,
        )
        exact = masked(call, torch.float64)[2:]
        for result, expected in zip(gradients(call), exact, strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


@each_dtype
def test_windows_as_large_as_the_grid_have_the_bits_of_dense_attention(dtype, generator):
    call = draw_call(generator, windows=((1, 2, 2), (9, 9, 9)), lengths=(23, 19), dtype=dtype)
    dense = implementations("rope3d_attention")["cpu_impl"]
    q, k, v, *_ = call.arguments
    out, lse = dense.forward(q, k, v, call.kv_len, call.scale)
    expected = dense.backward(call.dout, out, lse, q, k, v, call.kv_len, call.scale)
    for result, wanted in zip(gradients(call), expected, strict=True):
        assert_equal(result, wanted)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "lengths"),
    [(1, None), (5, (150, 150)), (3, (150, 43, 121))],
    ids=["one head", "heads of one layout", "lengths"],
)
def test_any_number_of_threads_gives_the_same_bits(heads, lengths, dtype, generator):
    """Chunks of a head, heads of a layout in the same memory, and layouts after each other."""
    windows = ((1, 2, 1), (1, 1, 3), (2, 1, 2))[:heads] if lengths and heads < 5 else ((1, 1, 2),)
    windows = windows * (heads // len(windows))
    sizes = {"grid": (2, 7, 10), "tile": (1, 3, 3), "text": 10, "head_dim": 24}
    call = draw_call(generator, windows=windows, lengths=lengths, dtype=dtype, **sizes)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8, 8):
            torch.set_num_threads(threads)
            found.append(gradients(call))
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        for result, expected in zip(results, found[0], strict=True):
            assert_equal(result, expected)


@each_dtype
@pytest.mark.parametrize("lengths", [None, (23, 0), (10, 19)], ids=str)
def test_nothing_else_is_written(lengths, dtype, generator):
    """All gradients between canaries, rows and ends alike, and every element of them written."""
    call = draw_call(generator, lengths=lengths, head_dim=21, dtype=dtype)
    found = [Fenced(call.q.shape, dtype, gap=5) for _ in range(3)]
    with poisoned_memory():
        out, lse = cpu_impl.forward(*call.arguments)
        native.sliding_tile_attention_backward_cpu(
            *(call.dout, out, lse, *call.arguments, *(x.view for x in found), 2)
        )
    for fenced, expected in zip(found, gradients(call), strict=True):
        fenced.check()
        assert_equal(fenced.view, expected)


@each_dtype
def test_nothing_else_is_read(dtype, generator):
    """Between the rows of everything that is given lies NaN, and in the padding."""
    call = draw_call(generator, lengths=(21, 12), head_dim=13, dtype=dtype)
    out, lse = cpu_impl.forward(*call.arguments)
    expected = cpu_impl.backward(call.dout, out, lse, *call.arguments)

    def apart(x: Tensor) -> Tensor:
        room = torch.full((2, 25, 4, 40), torch.nan, dtype=dtype)
        view = room[:, 1:24, 1:3, 9:22]
        for item, length in enumerate(call.lengths):
            view[item, :length] = x[item, :length]
        return view

    far = call.map(apart)
    for result, wanted in zip(
        cpu_impl.backward(far.dout, apart(out), lse, *far.arguments), expected, strict=True
    ):
        assert_equal(result, wanted)


def test_gradients_of_the_output_may_lie_in_any_way(generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    out, lse = cpu_impl.forward(*call.arguments)
    expected = cpu_impl.backward(call.dout, out, lse, *call.arguments)
    across = call.dout.mT.contiguous().mT
    one = call.dout[:, :, :1, :1].expand(call.dout.shape)
    strided = torch.stack((lse, lse), -1)[..., 0]
    for result, wanted in zip(
        cpu_impl.backward(across, out.mT.contiguous().mT, strided, *call.arguments),
        expected,
        strict=True,
    ):
        assert_equal(result, wanted)
    for result, wanted in zip(
        cpu_impl.backward(one, out, lse, *call.arguments),
        cpu_impl.backward(one.contiguous(), out, lse, *call.arguments),
        strict=True,
    ):
        assert_equal(result, wanted)


@each_dtype
def test_any_scale(dtype, generator):
    for scale in (-0.3, 0.0):
        call = replace(draw_call(generator, dtype=dtype), scale=scale)
        judge("cpu_impl", run("cpu_impl", call), call)


@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_no_more_memory_than_dense_attention(threads, dtype):
    """Beside the numbers of tokens; the part of a clip that a head sees does not matter."""
    grid, text = (9, 16, 16), 256
    for length, heads, head_dim in ((2560, 24, 128), (2560, 3, 64), (2600, 1, 256)):
        q = torch.empty(1, dtype=dtype).expand(1, length, heads, head_dim)
        _, dense = native.rope3d_attention_bytes_cpu(q, None, threads)
        for tile, window in (
            ((3, 4, 4), (1, 1, 1)),
            ((2, 3, 5), (3, 3, 3)),
            ((9, 8, 8), (1, 2, 1)),
        ):
            assert fraction(grid, tile, window, text) < 1
            windows = torch.tensor([window] * heads, dtype=torch.int32)
            ours = native.sliding_tile_attention_bytes_cpu(q, windows, grid, tile, None, threads)
            # dense chunks are of equal size, a few rows less than there may be
            assert ours <= dense * 1.01


def test_the_native_function_checks_what_it_is_given(generator):
    call = draw_call(generator)
    out, lse = cpu_impl.forward(*call.arguments)
    grads = [torch.empty_like(call.q) for _ in range(3)]
    good = [call.dout, out, lse, *call.arguments, *grads, 1]
    native.sliding_tile_attention_backward_cpu(*good)
    for place, bad, message in (
        (0, call.dout.half(), "dout must be float32, got float16"),
        (1, out[:, :-1], "out does not fit the other tensors"),
        (2, lse[..., :-1], "lse does not fit"),
        (2, torch.empty(1, 2, 46)[..., ::2], "lse must be contiguous"),
        (3, call.q.double(), "q must be float32"),
        (5, call.v[:, :, :1], "v does not fit"),
        (6, call.windows[:1], "windows does not fit"),
        (7, (2, 3, 4), "grid must have at most L = 23 tokens"),
        (9, torch.tensor([24]), r"kv_len must lie in \[0, L\] = \[0, 23\], got 24"),
        (11, grads[0][:, 1:], "dq does not fit"),
        (12, grads[1].mT.contiguous().mT, "dk must be contiguous in its last dimension"),
        (13, grads[2].bfloat16(), "dv must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            native.sliding_tile_attention_backward_cpu(*good[:place], bad, *good[place + 1 :])
