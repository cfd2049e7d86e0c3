"""Sliding-tile attention as an op: registration, compilation, what is kept, what is refused."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.sliding_tile_attention import library_impl, reference
from hunyuan_fast.ops import SlidingTiles, attention, sliding_tile_attention
from tests.kit import gpu
from tests.kit.numerics import assert_equal
from tests.ops.sliding_tile_attention_cases import ROOM, answering, draw_call, run


@pytest.mark.parametrize("lengths", [None, (21, 10)], ids=str)
@pytest.mark.parametrize("name", sorted(set(answering(torch.bfloat16)) - {"triton_impl"}))
def test_registration(name, lengths, generator):
    call = draw_call(generator, lengths=lengths, dtype=torch.bfloat16)
    ops = torch.ops.hunyuan_fast
    with use(name, ROOM):
        out, lse = ops.sliding_tile_attention(*call.flat)
        beside = torch.zeros(*call.q.shape[:2], 5, 16, dtype=torch.bfloat16)[:, :, 1:3]
        opcheck(ops.sliding_tile_attention_bwd.default, (call.dout, out, lse, *call.flat))
        opcheck(ops.sliding_tile_attention_out.default, (*call.flat, beside))
        leaves = [x.requires_grad_() for x in call.tensors]
        opcheck(ops.sliding_tile_attention.default, (*leaves, *call.flat[3:]))


def test_compiles_whole_and_once_for_three_grids(generator):
    counter = CompileCounter()

    def attend(q: Tensor, k: Tensor, v: Tensor, latents: Tensor, windows: Tensor) -> Tensor:
        pattern = SlidingTiles(latents.shape, (2, 2, 2), windows)
        return attention(q, k, v, pattern=pattern)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for height in (3, 5, 8):
        call = draw_call(generator, grid=(2, height, 3))
        latents = torch.empty(call.grid)
        torch._dynamo.mark_dynamic(latents, 1)
        for x in call.tensors:
            torch._dynamo.mark_dynamic(x, 1)
        given = *call.tensors, latents, call.windows
        assert_equal(compiled(*given), attend(*given))
    assert counter.frame_count == 1


def test_compiled_gradients(generator):
    call = draw_call(generator, lengths=(21, 10))
    options = call.options | {"windows": call.windows.tolist()}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_tile_attention(q, k, v, **options)

    leaves = [x.requires_grad_() for x in call.tensors]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    gradients = torch.autograd.grad(compiled, leaves, call.dout)
    for got, wanted in zip(gradients, run(None, call)[2:], strict=True):
        assert_equal(got, wanted)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values of the largest tensor any operation returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


def test_no_mask_and_no_table_of_scores(generator):
    """With 1088 tokens a mask would have 1183744 values; nothing is larger than the inputs."""
    call = draw_call(generator, grid=(4, 16, 16), tile=(2, 4, 4), windows=((1, 3, 3),), text=64)
    with LargestTensor() as largest:
        out, lse = library_impl.forward(*call.arguments)
        library_impl.backward(call.dout, out, lse, *call.arguments)
    assert largest.values == call.q.numel()


def test_the_reference_holds_scores_of_few_queries(generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 16)
    call = draw_call(generator, grid=(4, 8, 8), windows=((1, 3, 3),), text=0)
    with LargestTensor() as largest:
        reference.forward(*call.arguments)
    assert largest.values == 16 * 256


def test_backward_keeps_inputs_output_and_one_number_a_row(generator):
    call = draw_call(generator)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        leaves = [x.requires_grad_() for x in call.tensors]
        out = sliding_tile_attention(*leaves, **call.options)
    inputs = {x.data_ptr() for x in (*leaves, out, call.windows)}
    (lse,) = [t for t in kept if t.data_ptr() not in inputs]
    assert lse.shape == (1, 2, call.q.shape[1]) and len(kept) == 6


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_inputs_need_no_gradient(needed, generator):
    call = draw_call(generator)
    expected = run(None, call)[2:]
    leaves = [x.requires_grad_(i in needed) for i, x in enumerate(call.tensors)]
    out = sliding_tile_attention(*leaves, **call.options)
    gradients = torch.autograd.grad(out, [leaves[i] for i in needed], call.dout)
    for i, gradient in zip(needed, gradients, strict=True):
        assert_equal(gradient, expected[i])


def test_windows_for_all_heads_and_for_each(generator):
    call = draw_call(generator, windows=((1, 1, 1), (1, 1, 1)))
    expected = sliding_tile_attention(*call.tensors, **call.options)
    ways = ((1, 1, 1), [1, 1, 1], [[1, 1, 1]], ((1, 1, 1), (1, 1, 1)), call.windows.long())
    for windows in ways:
        options = call.options | {"windows": windows}
        assert_equal(sliding_tile_attention(*call.tensors, **options), expected)


@pytest.mark.parametrize("size", [2**31, 2**32 + 1, 2**62])
def test_windows_and_tiles_of_any_size(size, generator):
    """More than there is of the grid is all of it, whatever 32 bits hold."""
    call = draw_call(generator)
    expected = attention(*call.tensors)
    for options in (
        {"windows": (size, size, size)},
        {"windows": torch.full((2, 3), size)},
        {"tile": (size, size, size), "windows": (1, 1, 1)},
    ):
        found = sliding_tile_attention(*call.tensors, **call.options | options)
        assert_equal(found, expected)
    with pytest.raises(ValueError, match="windows must be at least 1"):
        windows = torch.full((2, 3), 1 - size)
        sliding_tile_attention(*call.tensors, **call.options | {"windows": windows})


@pytest.mark.parametrize("shape", [(0, 23, 2, 8), (2, 23, 0, 8)], ids=str)
def test_empty_tensors(shape):
    q = torch.empty(shape, requires_grad=True)
    kv_len = torch.zeros(shape[0], dtype=torch.int32)
    options = {"grid": (2, 3, 3), "tile": (2, 2, 2), "windows": (1, 1, 1), "kv_len": kv_len}
    out, lse = sliding_tile_attention(q, q, q, **options, return_lse=True)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])
    out.sum().backward()
    assert q.grad.shape == shape


def test_the_cpu_has_answers(generator):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        reasons = explain(ROOM, *draw_call(generator, dtype=dtype).arguments)
        assert reasons["library_impl"] is None
        if "cpu_impl" in implementations(ROOM) and dtype != torch.float32:
            assert (reasons["cpu_impl"] is None) == (dtype != torch.float64)
    assert explain(ROOM, *reference.example(torch.device("cpu")))["reference"] is None


Q = torch.zeros(2, 23, 2, 4)
GIVEN = {"grid": (2, 3, 3), "tile": (2, 2, 2), "windows": (1, 1, 1)}
REFUSALS = {
    "q of three dimensions": (Q[0], {}, ValueError, r"q must be \(B, L, N, D\)"),
    "integers": (Q.int(), {}, TypeError, "floating-point"),
    "two sizes": (Q, {"grid": (6, 3)}, ValueError, r"grid must be three ints along .*\(6, 3\)"),
    "a fraction": (Q, {"tile": (2, 2.0, 2)}, TypeError, "tile must be three ints"),
    "an empty grid": (Q, {"grid": (2, 0, 3)}, ValueError, r"grid must be positive .*\(2, 0, 3\)"),
    "an empty tile": (Q, {"tile": (2, 2, -1)}, ValueError, "tile must be positive"),
    "more video than tokens": (Q, {"grid": (2, 3, 4)}, ValueError, "at most L = 23 tokens"),
    "no windows": (Q, {"windows": ()}, TypeError, "windows must be ints or a tensor"),
    "two windows": (Q, {"windows": (1, 1)}, TypeError, "windows must be three ints"),
    "half a window": (Q, {"windows": (1, 1.5, 1)}, TypeError, "windows must be three ints"),
    "an empty window": (Q, {"windows": (1, 0, 1)}, ValueError, "windows must be at least 1"),
    "windows of other heads": (Q, {"windows": [(1, 1, 1)] * 3}, ValueError, "each of 2 heads"),
    "a tensor of other heads": (
        *(Q, {"windows": torch.ones(3, 3, dtype=torch.int32)}),
        *(ValueError, r"windows must be \(N, 3\) = \(2, 3\), got \(3, 3\)"),
    ),
    "a tensor of floats": (Q, {"windows": torch.ones(2, 3)}, TypeError, "int32 or int64"),
    "a tensor elsewhere": (
        *(Q, {"windows": torch.ones(2, 3, dtype=torch.int32, device="meta")}),
        *(ValueError, "windows must be on the device of q, cpu"),
    ),
    "a tensor with an empty window": (
        *(Q, {"windows": torch.zeros(2, 3, dtype=torch.int32)}),
        *(ValueError, "windows must be at least 1"),
    ),
    "kv_len of another batch": (
        *(Q, {"kv_len": torch.tensor([5])}),
        *(ValueError, r"kv_len must be \(B,\) = \(2,\)"),
    ),
    "kv_len too long": (Q, {"kv_len": torch.tensor([24, 0])}, ValueError, r"\[0, 23\]"),
    "out of another shape": (Q, {"out": Q[:1]}, ValueError, "out must have the shape"),
    "out in training": (
        *(Q.clone().requires_grad_(), {"out": torch.zeros(2, 23, 2, 4)}),
        *(ValueError, "out is for inference"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case):
    q, options, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        sliding_tile_attention(q, q, q, **GIVEN | options)


@pytest.mark.gpu
def test_a_whole_clip_on_a_gpu():
    """129 frames of 720p, whose grid no tile divides: rows here and there against plain sums."""
    grid, tile, text = gpu.size(((33, 45, 80), (6, 8, 8), 256), ((3, 5, 8), (2, 2, 4), 20))
    length = math.prod(grid) + text
    q, k, v = torch.randn(3, 1, length, 2, 128, device="cuda", dtype=torch.bfloat16)
    options = {"grid": grid, "tile": tile, "windows": ((3, 3, 3), (6, 1, 10))}
    with use("triton_impl", ROOM):
        out, lse = sliding_tile_attention(q, k, v, **options, return_lse=True)
    given = q, k, v, torch.tensor(options["windows"], dtype=torch.int32, device="cuda"), grid, tile
    for start in (0, length // 2 - 137 % length, length - text - 7, length - 16):
        rows = slice(start, start + 16)
        seen = reference._seen(rows, length, *given[3:], None)
        query, key, value = (x[0].transpose(0, 1).double() for x in (q[:, rows], k, v))
        scores = (128**-0.5 * (query @ key.mT)).masked_fill(~seen[0], -torch.inf)
        expected = (scores.softmax(-1) @ value).transpose(0, 1)
        torch.testing.assert_close(out[0, rows].double(), expected, rtol=2**-6, atol=2**-9)
        torch.testing.assert_close(lse[0, :, rows].double(), scores.logsumexp(-1))
