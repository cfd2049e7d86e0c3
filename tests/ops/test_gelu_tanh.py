"""GELU alone and behind another tensor: every implementation against the truth and an oracle."""

import itertools
import os
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from hunyuan_fast.dispatch import explain, implementations, select, use
from hunyuan_fast.kernels.gelu_tanh import reference
from hunyuan_fast.ops import concat_gelu_tanh, gelu_tanh
from tests.kit.inputs import FAMILIES, LAYOUTS, draw, with_layout
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_as_good_as, assert_equal, assert_rounded_once

ROOM = "gelu_tanh"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of every length modulo the vector widths; 12288 is the model's.
WIDTHS = (1, 7, 64, 127, 768, 1023, 3073, 12288)
# Where there is a GPU, Triton compiles its kernels and refuses tensors on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_ON_CPU = {"cuda_impl"} if INTERPRETED else {"cuda_impl", "triton_impl"}
ON_CPU = tuple(name for name in implementations(ROOM) if name not in NOT_ON_CPU)
QUICK = tuple(name for name in ON_CPU if name != "triton_impl")

each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_quick_implementation = pytest.mark.parametrize("name", QUICK)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def inputs(
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    family: str = "normal",
) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output."""
    return draw(family, shape, generator, dtype), draw("normal", shape, generator, dtype)


def concat_inputs(
    batch: int,
    length: int,
    widths: tuple[int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """left, x and the gradient of the output."""
    sizes = (*widths, sum(widths))
    left, x, dy = (draw("normal", (batch, length, n), generator, dtype) for n in sizes)
    return left, x, dy


def plain(x: Tensor, dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y and dx of torch's own function in ``dtype``; float64 is the truth."""
    leaf = x.detach().cpu().to(dtype, copy=True).requires_grad_()
    y = gelu(leaf, approximate="tanh")
    return y.detach(), *torch.autograd.grad(y, leaf, dy.cpu().to(dtype))


def run(name: str, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The same of one implementation, through the public function."""
    leaf = x.detach().requires_grad_()
    with use(name, ROOM):
        y = gelu_tanh(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, dy)


def run_concat(name: str, left: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dleft and dx."""
    leaves = [t.detach().requires_grad_() for t in (left, x)]
    with use(name, ROOM):
        y = concat_gelu_tanh(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)


def assert_right(actual: tuple[Tensor, Tensor], x: Tensor, dy: Tensor) -> None:
    """Tier A for the output, and for the gradient, which is rounded once as well.

    In fp32 the errors of a few numbers are luck: those are judged by torch's worst among many.
    """
    exact, single = plain(x, dy, torch.float64), plain(x, dy, torch.float32)
    few = x.dtype == torch.float32 and x.numel() < 4096
    for index, name in enumerate(("y", "dx")):
        got, true = actual[index].cpu(), exact[index]
        if few:
            assert_as_good_as(got, true, true + worst_error_of_torch()[index], name=name)
        else:
            assert_rounded_once(got, true, single[index], name=name)


@cache
def worst_error_of_torch() -> tuple[float, float]:
    """Of y and dx in fp32, for inputs spread as the tests spread them."""
    x, dy = (torch.randn(2**16, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    pairs = zip(*(plain(3 * x, dy, t) for t in (torch.float32, torch.float64)), strict=True)
    y, dx = (float((single.double() - true).abs().max()) for single, true in pairs)
    return y, dx


def assert_concat_right(
    actual: tuple[Tensor, Tensor, Tensor], left: Tensor, x: Tensor, dy: Tensor
) -> None:
    y, dleft, dx = actual
    width = left.shape[-1]
    assert_equal(y[..., :width], left)
    assert_equal(dleft, dy[..., :width])
    assert_right((y[..., width:], dx), x, dy[..., width:])


def test_reference_against_an_oracle_in_float64(generator):
    x, dy = (3 * t.double() for t in inputs((2, 5, 33), generator))
    for ours, oracle in zip(run("reference", x, dy), plain(x, dy, torch.float64), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_reference_gradients_by_finite_differences(generator):
    left, x, _ = (t.double().requires_grad_() for t in concat_inputs(2, 3, (2, 5), generator))
    assert torch.autograd.gradcheck(gelu_tanh, x)
    assert torch.autograd.gradcheck(concat_gelu_tanh, (left, x))


@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
@each_quick_implementation
def test_values_far_from_normal(name, family, dtype, generator):
    x, dy = inputs((3, 7, 3072), generator, dtype, family)
    assert_right(run(name, x, dy), x, dy)
    assert_right(run(name, -x, dy), -x, dy)


@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@each_implementation
def test_every_width(name, width, dtype, generator):
    x, dy = inputs((3, width), generator, dtype)
    assert_right(run(name, 3 * x, dy), 3 * x, dy)


@each_dtype
@pytest.mark.parametrize("widths", [(1, 1), (7, 3), (64, 256), (3, 1025), (3072, 5)], ids=str)
@each_implementation
def test_concat_of_every_width(name, widths, dtype, generator):
    args = concat_inputs(2, 3, widths, generator, dtype)
    assert_concat_right(run_concat(name, *args), *args)


@each_quick_implementation
def test_random_shapes(name, generator):
    for _ in range(10):
        batch, length, left, width = (
            int(torch.randint(1, high, (), generator=generator)) for high in (5, 40, 2000, 8193)
        )
        dtype = DTYPES[width % 3]
        args = concat_inputs(batch, length, (left, width), generator, dtype)
        assert_concat_right(run_concat(name, *args), *args)
        assert_right(run(name, args[1], args[1]), args[1], args[1])


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2, 5), (2, 1, 2, 1, 2, 17)], ids=str)
@each_implementation
def test_any_number_of_dimensions(name, shape, generator):
    x, dy = inputs(shape, generator, torch.bfloat16)
    assert_right(run(name, x, dy), x, dy)
    turned = [t.permute(*reversed(range(t.dim()))) for t in (x, dy)]
    assert_right(run(name, *turned), *turned)
    swapped = [t.transpose(0, -2) for t in (x, dy)] if len(shape) > 1 else [x, dy]
    assert_right(run(name, *swapped), *swapped)


def test_more_dimensions_than_the_cpu_kernels_know(generator):
    x, dy = inputs((1, 2, 1, 2, 1, 2, 3), generator)
    assert select(ROOM, x) is reference
    assert_right(run("reference", x, dy), x, dy)


@pytest.mark.parametrize("shape", [(0,), (0, 4, 8), (2, 0, 8), (2, 3, 0)], ids=str)
@each_implementation
def test_no_elements(name, shape, generator):
    x, dy = inputs(shape, generator, torch.bfloat16)
    y, dx = run(name, x, dy)
    assert y.shape == dx.shape == shape
    with use(name, ROOM):
        assert gelu_tanh(x, out=y) is y


@pytest.mark.parametrize("sizes", [(0, 4, 8, 3), (2, 0, 8, 3), (2, 3, 0, 5), (2, 3, 5, 0)], ids=str)
@each_implementation
def test_concat_with_nothing(name, sizes, generator):
    batch, length, *widths = sizes
    left, x, dy = concat_inputs(batch, length, tuple(widths), generator)
    y, dleft, dx = run_concat(name, left, x, dy)
    expected = torch.cat((left, gelu(x, approximate="tanh")), dim=-1)
    torch.testing.assert_close(y, expected)
    assert (dleft.shape, dx.shape) == (left.shape, x.shape)


@pytest.mark.parametrize(
    "x_layout, dy_layout", [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)]
)
@each_implementation
def test_layouts_do_not_matter(name, x_layout, dy_layout, generator):
    left, x, dy = concat_inputs(2, 3, (20, 127), generator, torch.bfloat16)
    left, x, dy = (
        with_layout(t, layout) for t, layout in ((left, dy_layout), (x, x_layout), (dy, dy_layout))
    )
    simple = [t.contiguous().clone() for t in (left, x, dy)]
    awkward = (run_concat(name, left, x, dy), run(name, x, dy[..., 20:]))
    expected = (run_concat(name, *simple), run(name, simple[1], simple[2][..., 20:]))
    for got, wanted in zip(itertools.chain(*awkward), itertools.chain(*expected), strict=True):
        assert_equal(got, wanted)
    assert awkward[0][0].is_contiguous() and awkward[0][2].is_contiguous()
    assert all(t.is_contiguous() for t in awkward[1])


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_last_dimension_may_be_strided(name, generator):
    left, x, dy = concat_inputs(2, 7, (3, 5), generator)
    strided = [t.mT.contiguous().mT for t in (left, x, dy)]
    assert all(t.stride(-1) != 1 for t in strided)
    for got, wanted in zip(run_concat(name, *strided), run_concat(name, left, x, dy), strict=True):
        assert_equal(got, wanted)


def test_outputs_too_large_for_the_allocator_to_keep(generator):
    """Of more than 32 MB: the C++ kernels ask for huge pages there."""
    pytest.importorskip("hunyuan_fast._C")
    left, x, dy = concat_inputs(1, 701, (64, 12288), generator)
    assert x.nbytes > 2**25
    whole = run_concat("cpu_impl", left, x, dy)
    for rows in (slice(0, 2), slice(350, 353), slice(700, 701)):
        part = run_concat("cpu_impl", *(t[:, rows] for t in (left, x, dy)))
        for got, wanted in zip(whole, part, strict=True):
            assert_equal(got[:, rows], wanted)
    with use("cpu_impl", ROOM):
        assert_equal(gelu_tanh(x), whole[0][..., 64:].contiguous())


@pytest.mark.parametrize("far", ["rows", "samples"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_memory_past_two_to_the_31(name, far, generator):
    batch, length = (1, 3) if far == "rows" else (3, 1)
    args = concat_inputs(batch, length, (64, 128), generator, torch.bfloat16)
    step = 2**30 + 64
    strides = (3 * step, step, 1) if far == "rows" else (step, 256, 1)
    distant = [far_apart(t.shape, strides).copy_(t) for t in args]
    for got, wanted in zip(run_concat(name, *distant), run_concat(name, *args), strict=True):
        assert_equal(got, wanted)
    out = far_apart(args[1].shape, strides)
    with use(name, ROOM):
        gelu_tanh(distant[1], out=out)
        assert_equal(out, gelu_tanh(args[1]))


@each_dtype
@each_implementation
def test_the_ends(name, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, largest, 13.0, 0.0, -0.0, -13.0, -largest, -torch.inf, torch.nan])
    y, dx = run(name, x.to(dtype), torch.ones(9, dtype=dtype))
    assert_equal(y[:3], x[:3].to(dtype))
    assert_equal(y[3:8], torch.zeros(5, dtype=dtype))
    assert y[4].signbit()
    assert dx.tolist()[:8] == [1, 1, 1, 0.5, 0.5, 0, 0, 0]
    assert y[8].isnan() and dx[8].isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_implementation
def test_a_bad_element_stays_alone(name, value, generator):
    left, x, dy = concat_inputs(2, 4, (5, 130), generator, torch.bfloat16)
    clean = run_concat(name, left, x, dy)
    spoiled = [t.clone() for t in (left, x, dy)]
    for t in spoiled:
        t[1, 2, 3] = value
    for at, got, wanted in zip(([3, 8], [3], [3]), run_concat(name, *spoiled), clean, strict=True):
        bad = torch.zeros(got.shape, dtype=torch.bool)
        bad[1, 2, at] = True
        assert_equal(got[~bad], wanted[~bad])


@each_quick_implementation
def test_the_same_bits_at_every_run(name, generator):
    args = concat_inputs(2, 30, (257, 1025), generator, torch.bfloat16)
    first = run_concat(name, *args)
    for _ in range(10):
        for got, wanted in zip(run_concat(name, *args), first, strict=True):
            assert_equal(got, wanted)


def test_cpu_kernels_do_not_depend_on_the_number_of_threads(generator):
    pytest.importorskip("hunyuan_fast._C")
    args = concat_inputs(2, 30, (257, 4099), generator, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((*run_concat("cpu_impl", *args), *run("cpu_impl", args[1], args[1])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert_equal(got, wanted)


@pytest.mark.parametrize("needed", ["left", "x"])
@each_implementation
def test_gradients_of_some_inputs_only(name, needed, generator):
    left, x, dy = concat_inputs(2, 3, (8, 40), generator)
    _, dleft, dx = run_concat(name, left, x, dy)
    left.requires_grad_(needed == "left")
    x.requires_grad_(needed == "x")
    with use(name, ROOM):
        concat_gelu_tanh(left, x).backward(dy)
    for leaf, gradient in ((left, dleft), (x, dx)):
        if leaf.requires_grad:
            assert_equal(leaf.grad, gradient)
        else:
            assert leaf.grad is None


@each_implementation
def test_backward_keeps_a_view_and_returns_one(name, generator):
    """Of a layer's output the view is kept, not a copy; of the gradient of left none is made."""
    packed = torch.randn(2, 3, 50, generator=generator, requires_grad=True)
    left = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    dy = torch.randn(2, 3, 28, generator=generator)
    x = packed.sin()[..., 30:]
    kept: list[Tensor] = []
    with use(name, ROOM), torch.autograd.graph.saved_tensors_hooks(kept.append, kept.append):
        concat_gelu_tanh(left.detach(), x)
        gelu_tanh(x)
        assert [t.data_ptr() for t in kept] == [x.data_ptr()] * 2
        concat_gelu_tanh(left, x.detach())
        assert len(kept) == 2
    with use(name, ROOM):
        (dleft,) = torch.autograd.grad(concat_gelu_tanh(left, x.detach()), left, dy)
    assert dleft.data_ptr() == dy.data_ptr()


@each_implementation
def test_second_derivative_is_refused(name, generator):
    left, x, _ = concat_inputs(1, 2, (3, 8), generator)
    x.requires_grad_()
    for call in (gelu_tanh, lambda x: concat_gelu_tanh(left, x)):
        with use(name, ROOM):
            (dx,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
            (alone,) = torch.autograd.grad(call(x).sum(), x)
            assert_equal(dx.detach(), alone)
            with pytest.raises(RuntimeError, match="gelu_tanh has no second derivative"):
                dx.sum().backward()


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=str)
@each_dtype
def test_autocast_changes_nothing(dtype, enabled, generator):
    args = concat_inputs(2, 4, (8, 48), generator, dtype)
    outside = (*run_concat("reference", *args), *run("reference", args[1], args[1]))
    with torch.autocast("cpu", enabled):
        inside = (*run_concat("reference", *args), *run("reference", args[1], args[1]))
    for got, wanted in zip(inside, outside, strict=True):
        assert_equal(got, wanted)


def test_who_answers_on_the_cpu():
    args = reference.example(torch.device("cpu"))
    reasons = explain(ROOM, *args)
    assert reasons["reference"] is None
    assert reasons["triton_impl"] is not None
    if "cpu_impl" in implementations(ROOM):
        assert select(ROOM, *args) is implementations(ROOM)["cpu_impl"]
