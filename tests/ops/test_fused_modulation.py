"""Adaptive layer norm: every implementation against the truth, the reference against an oracle."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import layer_norm_modulate
from tests.kit.inputs import FAMILIES, LAYOUTS, draw, with_layout
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_as_good_as, assert_equal, assert_rounded_once
from tests.ops.fused_modulation_cases import (
    DTYPES,
    ON_CPU,
    ROOM,
    each_dtype,
    each_implementation,
    each_quick_implementation,
)

# Rows of every length modulo the vector widths; 3072 is the model's.
WIDTHS = (7, 64, 127, 1023, 3071, 3072, 3073)


def inputs(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    family: str = "normal",
) -> list[Tensor]:
    """x, shift, scale and the gradient of the output."""
    batch, _, width = shape
    x = draw(family, shape, generator, dtype)
    shift, scale = (0.3 * torch.randn(batch, width, generator=generator) for _ in range(2))
    return [x, shift.to(dtype), scale.to(dtype), draw("normal", shape, generator, dtype)]


def plain(args: list[Tensor], dtype: torch.dtype, eps: float = 1e-6) -> list[Tensor]:
    """y, dx, dshift, dscale of torch's own layer norm in ``dtype``; float64 is the truth."""
    x, shift, scale, dy = (t.detach().cpu().to(dtype, copy=True) for t in args)
    leaves = [t.requires_grad_() for t in (x, shift, scale)]
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    y = normed * (1 + scale[:, None]) + shift[:, None]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def run(name: str, args: list[Tensor], eps: float = 1e-6) -> list[Tensor]:
    """The same of one implementation, through the public function."""
    *tensors, dy = args
    leaves = [t.detach().requires_grad_() for t in tensors]
    with use(name, ROOM):
        y = layer_norm_modulate(*leaves, eps=eps)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_right(actual: list[Tensor], args: list[Tensor], eps: float = 1e-6) -> None:
    """Tier A for the output, plain torch's error twice over for the gradients."""
    exact = plain(args, torch.float64, eps)
    single = plain(args, torch.float32, eps)
    same = plain(args, args[0].dtype, eps)
    actual = [t.cpu() for t in actual]
    assert_rounded_once(actual[0], exact[0], single[0], name="y")
    for index, name in enumerate(("dx", "dshift", "dscale"), 1):
        assert_as_good_as(actual[index], exact[index], same[index], name=name)


def test_reference_against_an_oracle_in_float64(generator):
    args = [t.double() for t in inputs((2, 5, 33), generator)]
    for ours, oracle in zip(run("reference", args), plain(args, torch.float64), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_reference_gradients_by_finite_differences(generator):
    leaves = [t.double().requires_grad_() for t in inputs((2, 3, 5), generator)[:3]]
    assert torch.autograd.gradcheck(layer_norm_modulate, leaves)


@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
@each_quick_implementation
def test_values_far_from_normal(name, family, dtype, generator):
    args = inputs((3, 7, 3072), generator, dtype, family)
    assert_right(run(name, args), args)


@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@each_implementation
def test_every_width(name, width, dtype, generator):
    shape = (2, 5, width) if width < 1000 else (1, 5, width)
    args = inputs(shape, generator, dtype)
    assert_right(run(name, args), args)


@each_quick_implementation
def test_random_shapes(name, generator):
    for _ in range(10):
        draws = [int(torch.randint(1, high, (), generator=generator)) for high in (5, 40, 8192)]
        dtype = DTYPES[sum(draws) % 3]
        args = inputs((draws[0], draws[1], draws[2] + 1), generator, dtype)
        assert_right(run(name, args), args)


@each_implementation
def test_tiny_rows_need_the_epsilon(name, generator):
    args = inputs((1, 4, 128), generator, torch.bfloat16, "tiny")
    assert_right(run(name, args, eps=1e-5), args, eps=1e-5)


@each_implementation
def test_width_of_one(name, generator):
    x, shift, scale, dy = inputs((2, 3, 1), generator)
    y, dx, *_ = run(name, [x, shift, scale, dy])
    assert_equal(y, shift[:, None].expand_as(y))
    # zero but for the rounding of dy (1 + scale), times rstd = 1 / sqrt(eps)
    assert (dx.abs() <= 1e3 * 2.0**-22 * (dy * (1 + scale[:, None])).abs()).all()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 1)], ids=str)
@each_implementation
def test_no_rows(name, shape, generator):
    y, dx, dshift, dscale = run(name, inputs(shape, generator, torch.bfloat16))
    assert y.shape == dx.shape == shape
    assert_equal(dshift, torch.zeros_like(dshift))
    assert_equal(dscale, torch.zeros_like(dscale))


@pytest.mark.parametrize(
    "x_layout, dy_layout", [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)]
)
@each_implementation
def test_layouts_do_not_matter(name, x_layout, dy_layout, generator):
    x, shift, scale, dy = inputs((2, 6, 127), generator, torch.bfloat16)
    x, dy = with_layout(x, x_layout), with_layout(dy, dy_layout)
    shift, scale = with_layout(shift, "offset_by_one"), with_layout(scale, "sliced")
    awkward = run(name, [x, shift, scale, dy])
    simple = run(name, [t.contiguous().clone() for t in (x, shift, scale, dy)])
    for name_of, got, wanted in zip(("y", "dx", "dshift", "dscale"), awkward, simple, strict=True):
        assert_equal(got, wanted, name=name_of)
        assert got.is_contiguous()


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_last_dimension_may_be_strided(name, generator):
    x, shift, scale, dy = inputs((2, 7, 5), generator)
    strided = [t.mT.contiguous().mT for t in (x, dy)]
    assert strided[0].stride(-1) != 1
    for got, wanted in zip(
        run(name, [strided[0], shift, scale, strided[1]]),
        run(name, [x, shift, scale, dy]),
        strict=True,
    ):
        assert_equal(got, wanted)


@pytest.mark.parametrize("far", ["rows", "samples", "vectors"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_memory_past_two_to_the_31(name, far, generator):
    shape = (3, 1, 128) if far != "rows" else (1, 3, 128)
    x, shift, scale, dy = inputs(shape, generator, torch.bfloat16)
    step = 2**30 + 64
    strides = (step, 128, 1) if far != "rows" else (3 * step, step, 1)
    if far == "vectors":
        distant = [x, *(far_apart(t.shape, (step, 1)).copy_(t) for t in (shift, scale)), dy]
    else:
        distant = [
            far_apart(shape, strides).copy_(x),
            shift,
            scale,
            far_apart(shape, strides).copy_(dy),
        ]
    for got, wanted in zip(run(name, distant), run(name, [x, shift, scale, dy]), strict=True):
        assert_equal(got, wanted)


@pytest.mark.parametrize("modulation", DTYPES, ids=lambda dtype: f"modulation_{str(dtype)[6:]}")
@each_dtype
@each_implementation
def test_modulation_of_another_dtype_is_read_exactly(name, dtype, modulation, generator):
    x, shift, scale, dy = inputs((2, 5, 64), generator)
    x, dy = x.to(dtype), dy.to(dtype)
    shift, scale = shift.to(modulation), scale.to(modulation)
    y, dx, dshift, dscale = run(name, [x, shift, scale, dy])
    assert (y.dtype, dx.dtype, dshift.dtype, dscale.dtype) == (dtype, dtype, modulation, modulation)
    args = [x, shift, scale, dy]
    exact, single = plain(args, torch.float64), plain(args, torch.float32)
    assert_rounded_once(y, exact[0], single[0])
    for got, true in zip((dx, dshift, dscale), exact[1:], strict=True):
        torch.testing.assert_close(got.double(), true.to(got.dtype).double(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_implementation
def test_a_bad_row_stays_alone(name, value, generator):
    x, shift, scale, dy = inputs((2, 4, 130), generator, torch.bfloat16)
    clean = run(name, [x, shift, scale, dy])
    x[1, 2, 129] = value
    y, dx, dshift, dscale = run(name, [x, shift, scale, dy])
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert y[bad].isnan().all() and dx[bad].isnan().all()
    assert_equal(y[~bad], clean[0][~bad])
    assert_equal(dx[~bad], clean[1][~bad])
    assert_equal(dshift, clean[2])
    assert_equal(dscale[0], clean[3][0])


@each_implementation
def test_a_sample_does_not_depend_on_its_batch(name, generator):
    args = inputs((3, 5, 96), generator, torch.bfloat16)
    whole = run(name, args)
    for b in range(3):
        for got, wanted in zip(run(name, [t[b : b + 1] for t in args]), whole, strict=True):
            assert_equal(got, wanted[b : b + 1])


def test_implementations_exchange_statistics(generator):
    x, shift, scale, dy = inputs((2, 6, 200), generator, torch.bfloat16)
    usable = [impl for name, impl in implementations(ROOM).items() if name in ON_CPU]
    args = [x, shift, scale, dy]
    exact, same = plain(args, torch.float64), plain(args, torch.bfloat16)
    for first, second in itertools.permutations(usable, 2):
        _, _, stats = first.forward(x, shift, scale, 1e-6)
        assert stats.dtype == torch.float32 and stats.shape == (2, 2, 6)
        for index, got in enumerate(second.backward(dy, x, scale, stats)[:3], 1):
            assert_as_good_as(got, exact[index], same[index])


@each_quick_implementation
def test_the_same_bits_at_every_run(name, generator):
    args = inputs((2, 300, 257), generator, torch.bfloat16)
    first = run(name, args)
    for _ in range(10):
        for got, wanted in zip(run(name, args), first, strict=True):
            assert_equal(got, wanted)


def test_cpu_kernels_do_not_depend_on_the_number_of_threads(generator):
    pytest.importorskip("hunyuan_fast._C")
    args = inputs((2, 300, 1025), generator, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run("cpu_impl", args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert_equal(got, wanted)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    pytest.importorskip("hunyuan_fast._C")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [__file__, *(__file__.replace(".py", f"_{name}.py") for name in ("gate", "large"))]
        + ["-k", "(cpu_impl and (every_width or bad_row or by_index or 16_bits)) or large"],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("needed", [c for n in (1, 2) for c in itertools.combinations(range(3), n)])
@each_implementation
def test_gradients_of_some_inputs_only(name, needed, generator):
    *tensors, dy = inputs((2, 3, 40), generator)
    whole = run(name, [*tensors, dy])[1:]
    leaves = [t.requires_grad_(index in needed) for index, t in enumerate(tensors)]
    with use(name, ROOM):
        layer_norm_modulate(*leaves).backward(dy)
    for index, leaf in enumerate(leaves):
        if index in needed:
            assert_equal(leaf.grad, whole[index])
        else:
            assert leaf.grad is None
