"""GELU as it is called: in place, into views, compiled, traced, and wrongly."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from hunyuan_fast.dispatch import use
from hunyuan_fast.ops import concat_gelu_tanh, gelu_tanh
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import Fenced
from tests.kit.numerics import assert_equal
from tests.ops.test_gelu_tanh import (
    ROOM,
    concat_inputs,
    each_dtype,
    each_implementation,
    inputs,
)

OPS = torch.ops.hunyuan_fast


@each_dtype
@each_implementation
def test_in_place(name, dtype, generator):
    x, _ = inputs((2, 9, 131), generator, dtype)
    with use(name, ROOM):
        expected = gelu_tanh(x)
        assert gelu_tanh(x, out=x) is x
    assert_equal(x, expected)


@each_dtype
@each_implementation
def test_beside_other_results(name, dtype, generator):
    """The rows of a wider buffer, with canaries between and around them."""
    x, _ = inputs((2, 9, 131), generator, dtype)
    fenced = Fenced((18, 131), dtype, gap=5)
    with use(name, ROOM):
        out = gelu_tanh(x.view(18, 131), out=fenced.view)
        assert out is fenced.view
        fenced.check()
        assert_equal(out, gelu_tanh(x).view(18, 131))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@each_implementation
def test_out_of_any_layout(name, layout, generator):
    x, _ = inputs((3, 4, 33), generator, torch.bfloat16)
    with use(name, ROOM):
        expected = gelu_tanh(x)
        out = with_layout(torch.zeros_like(x), layout)
        assert_equal(gelu_tanh(x, out=out), expected)
        columns_first = torch.zeros(33, 3, 4, dtype=torch.bfloat16).permute(1, 2, 0)
        assert_equal(gelu_tanh(x, out=columns_first), expected)
        strided_in_place = x.mT.contiguous().mT
        assert_equal(gelu_tanh(strided_in_place, out=strided_in_place), expected)


@each_implementation
def test_out_beside_x_in_one_buffer(name, generator):
    buffer = torch.randn(2, 5, 64, generator=generator)
    x, out = buffer[..., 7:32], buffer[..., 32:57]
    before = buffer.clone()
    with use(name, ROOM):
        expected = gelu_tanh(x)
        gelu_tanh(x, out=out)
    assert_equal(out, expected)
    before[..., 32:57] = expected
    assert_equal(buffer, before)


BUFFER = torch.zeros(2, 5, 64)
OVERLAPS = {
    "shifted columns": (BUFFER[..., :40], BUFFER[..., 20:60]),
    "shifted rows": (BUFFER[:, :4], BUFFER[:, 1:]),
    "other strides": (BUFFER[0, :, :5], BUFFER[0, :, :5].mT),
    "end meets start": (BUFFER.flatten()[:320], BUFFER.flatten()[319:639]),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_views_are_refused(case):
    x, out = OVERLAPS[case]
    with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
        gelu_tanh(x, out=out)


def test_halves_of_a_buffer_do_not_overlap(generator):
    buffer = torch.randn(640, generator=generator)
    expected = gelu_tanh(buffer[:320].clone())
    assert_equal(gelu_tanh(buffer[:320], out=buffer[320:]), expected)
    assert_equal(gelu_tanh(buffer.view(2, 320)[0:1], out=buffer.view(2, 320)[1:]), expected[None])


def test_the_stride_of_one_element_does_not_matter(generator):
    x = torch.randn(1, 40, generator=generator)
    again = x.as_strided((1, 40), (7, 1))
    expected = gelu_tanh(x)
    assert_equal(gelu_tanh(x, out=again), expected)


def test_out_that_repeats_memory_is_refused():
    with pytest.raises(ValueError, match=r"out must not repeat memory, got strides \(0, 1\)"):
        gelu_tanh(torch.zeros(3, 4), out=torch.zeros(4).expand(3, 4))


def test_out_is_for_inference(generator):
    x, _ = inputs((2, 8), generator)
    expected = gelu_tanh(x)
    x.requires_grad_()
    with pytest.raises(ValueError, match="out is for inference"):
        gelu_tanh(x, out=torch.zeros(2, 8))
    with torch.no_grad():
        assert_equal(gelu_tanh(x, out=torch.zeros(2, 8)), expected)


def test_writing_into_what_autograd_has_kept_is_noticed(generator):
    x = torch.randn(2, 8, generator=generator, requires_grad=True)
    y = x.sin()
    squared = y.square()
    with torch.no_grad():
        gelu_tanh(y, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@each_implementation
def test_registration(name, generator):
    left, x, dy = concat_inputs(1, 2, (4, 16), generator, torch.bfloat16)
    with use(name, ROOM):
        opcheck(OPS.gelu_tanh.default, (x,))
        opcheck(OPS.concat_gelu_tanh.default, (left, x))
        opcheck(OPS.gelu_tanh_bwd.default, (dy[..., 4:], x))
        opcheck(OPS.gelu_tanh_out.default, (x, torch.zeros_like(x)))


def test_compiles_whole_and_once_for_three_lengths(generator):
    def both(left, x):
        return gelu_tanh(x), concat_gelu_tanh(left, x)

    for training in (False, True):
        counter = CompileCounter()
        torch.compiler.reset()
        compiled = torch.compile(both, fullgraph=True, backend=counter)
        for length in (6, 10, 14):
            left, x, _ = concat_inputs(2, length, (8, 24), generator)
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(left, 1)
            x.requires_grad_(training)
            for got, wanted in zip(compiled(left, x), both(left, x), strict=True):
                assert got.requires_grad == training
                assert_equal(got, wanted)
        assert counter.frame_count == 1


def test_compiled_gradients(generator):
    left, x, dy = concat_inputs(2, 6, (8, 24), generator, torch.bfloat16)
    compiled = torch.compile(concat_gelu_tanh, fullgraph=True, backend="aot_eager")
    left.requires_grad_()
    one = [torch.autograd.grad(f(left, x), left, dy)[0] for f in (compiled, concat_gelu_tanh)]
    assert_equal(*one)
    leaves = [left, x.requires_grad_()]
    grads = [torch.autograd.grad(f(*leaves), leaves, dy) for f in (compiled, concat_gelu_tanh)]
    alone = torch.compile(gelu_tanh, fullgraph=True, backend="aot_eager")
    grads[0] += torch.autograd.grad(alone(x), x, dy[..., 8:])
    grads[1] += torch.autograd.grad(gelu_tanh(x), x, dy[..., 8:])
    for got, wanted in zip(*grads, strict=True):
        assert_equal(got, wanted)


def test_compiled_writes(generator):
    """Beside something else in a buffer of the compiled function's own, and in place."""

    def beside(x):
        buffer = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
        gelu_tanh(x, out=buffer[..., 3:])
        return buffer

    def in_place(x):
        return gelu_tanh(x, out=x)

    x, _ = inputs((4, 24), generator)
    expected = gelu_tanh(x)
    with torch.no_grad():
        y = torch.compile(beside, fullgraph=True, backend="aot_eager")(x)
        assert_equal(y[:, 3:], expected)
        assert_equal(y[:, :3], torch.zeros(4, 3))
        # inductor is who undoes the copies that tracing makes of what is written
        torch.compile(in_place, fullgraph=True, backend="inductor")(x)
        assert_equal(x, expected)


X = torch.zeros(2, 3, 4)
GELU_REFUSALS = {
    "x_not_a_tensor": (([1.0],), {}, TypeError, "x must be a tensor, got list"),
    "x_integer": ((X.int(),), {}, TypeError, "x must be float32.*got torch.int32"),
    "x_scalar": ((torch.zeros(()),), {}, ValueError, r"x must be \(..., M\)"),
    "out_not_a_tensor": ((X,), {"out": 1}, TypeError, "out must be a tensor, got int"),
    "out_shape": ((X,), {"out": X[0]}, ValueError, r"out must.*\(2, 3, 4\), got \(3, 4\)"),
    "out_dtype": ((X,), {"out": X.half()}, TypeError, "out must have the dtype.*torch.float16"),
    "out_device": ((X,), {"out": X.to("meta")}, ValueError, "out must be on.*got meta"),
}
CONCAT_REFUSALS = {
    "left_not_a_tensor": ((None, X), TypeError, "left must be a tensor, got NoneType"),
    "x_not_a_tensor": ((X, 1.0), TypeError, "x must be a tensor, got float"),
    "x_integer": ((X, X.long()), TypeError, "x must be float32.*got torch.int64"),
    "x_flat": ((X, X[0]), ValueError, r"x must be \(B, L, M\), got shape \(3, 4\)"),
    "left_flat": ((X[0], X), ValueError, r"left must be \(B, L, E\).*got \(3, 4\)"),
    "left_length": ((X[:, :2], X), ValueError, r"left must.*\(2, 3, 4\), got \(2, 2, 4\)"),
    "left_dtype": ((X.bfloat16(), X), TypeError, "left must have the dtype of x.*bfloat16"),
    "left_device": ((X.to("meta"), X), ValueError, "left must be on the device of x, cpu"),
}


@pytest.mark.parametrize("case", GELU_REFUSALS)
def test_refusals(case):
    args, kwargs, error, words = GELU_REFUSALS[case]
    with pytest.raises(error, match=words):
        gelu_tanh(*args, **kwargs)


@pytest.mark.parametrize("case", CONCAT_REFUSALS)
def test_concat_refusals(case):
    args, error, words = CONCAT_REFUSALS[case]
    with pytest.raises(error, match=words):
        concat_gelu_tanh(*args)
