"""Group norm with SiLU: every implementation against the truth, on awkward shapes and memory."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hunyuan_fast.dispatch import use
from hunyuan_fast.ops import (
    group_norm_affine,
    group_norm_silu,
    group_norm_stats,
    merge_group_norm_stats,
)
from tests.kit.inputs import FAMILIES
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_equal
from tests.ops.group_norm_silu_cases import (
    DTYPES,
    NAMES,
    ROOM,
    Call,
    answering_on_cpu,
    apply,
    assert_right,
    draw_call,
    last,
    plain,
    run,
)

# Where there is a GPU, Triton compiles its kernels and refuses tensors on the CPU.
ON_CPU = answering_on_cpu(os.environ.get("TRITON_INTERPRET") == "1")
FAST = [name for name in ON_CPU if name != "triton_impl"]
# One group and one for each channel; channels that no vector width divides; one frame, one place.
SHAPES = {
    "8 of 4": ((2, 8, 3, 5, 7), 4),
    "12 of 12": ((2, 12, 2, 3, 3), 12),
    "33 of 1": ((1, 33, 1, 9, 10), 1),
    "96 of 32": ((2, 96, 2, 4, 5), 32),
    "one place": ((3, 8, 1, 1, 1), 2),
    "one channel": ((2, 1, 3, 5, 5), 1),
    "many": ((1, 16, 3, 33, 41), 4),
}

each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_fast = pytest.mark.parametrize("name", FAST)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
with_and_without_silu = pytest.mark.parametrize("silu", [True, False], ids=["silu", "norm"])


def assert_same(actual, expected) -> None:
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        assert_equal(got, wanted, name=name)


@with_and_without_silu
def test_reference_against_an_oracle_in_float64(silu, generator):
    call = draw_call(generator, silu=silu, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in call.leaves]
    y = F.group_norm(call.x, 4, call.weight, call.bias, 1e-6)
    y = F.silu(y) if silu else y
    oracle = [y.detach(), *torch.autograd.grad(y, leaves, call.dy)]
    for ours, theirs in zip(run("reference", call), oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@with_and_without_silu
def test_reference_gradients_by_finite_differences(silu, generator):
    call = draw_call(generator, (2, 4, 2, 2, 3), 2, silu=silu, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in call.leaves]
    assert torch.autograd.gradcheck(lambda *given: apply(call.with_leaves(given)), leaves)


@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
@with_and_without_silu
@each_fast
def test_values_far_from_normal(name, silu, family, dtype, generator):
    call = draw_call(generator, (2, 32, 3, 6, 7), 8, silu=silu, dtype=dtype, family=family)
    assert_right(run(name, call), call)


@each_dtype
@with_and_without_silu
@pytest.mark.parametrize("shape", SHAPES)
@each_fast
def test_every_shape(name, shape, silu, dtype, generator):
    call = draw_call(generator, *SHAPES[shape], silu=silu, dtype=dtype)
    assert_right(run(name, call), call)


@pytest.mark.skipif("triton_impl" not in ON_CPU, reason="needs Triton's interpreter")
@pytest.mark.parametrize("shape", ["8 of 4", "33 of 1", "96 of 32", "one place"])
def test_triton_at_some_shapes(shape, generator):
    for silu, dtype in ((True, torch.bfloat16), (False, torch.float32), (True, torch.float16)):
        for family in ("normal", "offset_1000"):
            call = draw_call(generator, *SHAPES[shape], silu=silu, dtype=dtype, family=family)
            assert_right(run("triton_impl", call), call)


@each_fast
def test_random_shapes(name, generator):
    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(12):
        groups = pick(1, 32)
        shape = (pick(1, 3), groups * pick(1, 6), pick(1, 4), pick(1, 12), pick(1, 12))
        call = draw_call(generator, shape, groups, silu=pick(0, 1) == 1, dtype=DTYPES[pick(0, 2)])
        assert_right(run(name, call), call)


@pytest.mark.parametrize("offset", [0.0, 1000.0, 1e5])
@each_implementation
def test_statistics_are_exact_whatever_the_mean(name, offset, generator):
    x = torch.randn(2, 12, 3, 9, 11, generator=generator) + offset
    values = x.double().reshape(2, 4, -1)
    with use(name, ROOM):
        stats = group_norm_stats(last(x), 4)
    count, mean, squares = stats
    assert stats.shape == (3, 2, 4) and stats.dtype == torch.float64
    assert torch.equal(count, torch.full_like(count, values.shape[-1]))
    torch.testing.assert_close(mean, values.mean(-1), rtol=1e-10, atol=1e-7)
    exact = values.var(-1, correction=0) * values.shape[-1]
    torch.testing.assert_close(squares, exact, rtol=1e-6, atol=0)


@each_fast
def test_statistics_survive_outliers_and_drift(name, generator):
    """The first values are no guide to the others."""
    x = torch.randn(1, 8, 9, 24, 24, generator=generator)
    x[:, :, 0, 0, 0] = 1e4
    x[:, 4:] += torch.linspace(-1000, 1000, 9)[:, None, None]
    values = x.double().reshape(1, 4, -1)
    with use(name, ROOM):
        _, mean, squares = group_norm_stats(last(x), 4)
    torch.testing.assert_close(mean, values.mean(-1), rtol=1e-6, atol=1e-5)
    exact = values.var(-1, correction=0) * values.shape[-1]
    torch.testing.assert_close(squares, exact, rtol=1e-6, atol=0)


@each_implementation
def test_chunks_of_a_clip_share_the_statistics_of_the_whole(name, generator):
    call = draw_call(generator, (2, 8, 7, 4, 5), 4, dtype=torch.bfloat16, family="offset_10")
    rest = call.groups, call.weight, call.bias
    with use(name, ROOM), torch.no_grad():
        whole_stats = group_norm_stats(call.x, call.groups)
        for size in (1, 3, 7):
            chunks = call.x.split(size, dim=2)
            stats = merge_group_norm_stats([group_norm_stats(c, call.groups) for c in chunks])
            torch.testing.assert_close(stats, whole_stats, rtol=1e-5, atol=1e-6)
            pieces = [group_norm_silu(chunk, *rest, stats=whole_stats) for chunk in chunks]
            assert_equal(torch.cat(pieces, dim=2), apply(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_and_shift_are_the_norm(dtype, generator):
    x = torch.randn(2, 12, 3, 4, 5, generator=generator, dtype=torch.float64) * 3 + 1
    weight, bias = (torch.randn(12, generator=generator).to(dtype) for _ in range(2))
    scale, shift = group_norm_affine(group_norm_stats(x, 4), weight, bias, eps=1e-3)
    assert scale.shape == shift.shape == (2, 12)
    assert scale.dtype == shift.dtype == (dtype if dtype == torch.float64 else torch.float32)
    found = x * scale[:, :, None, None, None] + shift[:, :, None, None, None]
    wanted = torch.nn.functional.group_norm(x, 4, weight.double(), bias.double(), 1e-3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_scale_and_shift_refuse_what_does_not_fit():
    stats, vector = torch.ones(3, 1, 4, dtype=torch.float64), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must be \(C,\) with C a multiple of G = 4"):
        group_norm_affine(stats, vector[:6], vector)
    with pytest.raises(ValueError, match=r"bias must be \(C,\).*got shape \(8, 1\)"):
        group_norm_affine(stats, vector, vector[:, None])
    with pytest.raises(ValueError, match=r"bias must be like weight, \(8,\), got \(4,\)"):
        group_norm_affine(stats, vector, vector[:4])
    with pytest.raises(TypeError, match="stats must be float64"):
        group_norm_affine(stats.float(), vector, vector)


def test_merging_is_as_good_as_the_whole_in_float64(generator):
    x = torch.randn(2, 6, 5, 3, 4, generator=generator, dtype=torch.float64) + 1000
    x[:, :, 2] *= 3
    parts = [group_norm_stats(part, 3) for part in (x[:, :, :1], x[:, :, 1:3], x[:, :, 3:])]
    empty = group_norm_stats(x[:, :, :0], 3)
    assert_equal(merge_group_norm_stats([parts[0]]), parts[0])
    for order in (parts, parts[::-1], [empty, *parts], [*parts, empty], [empty, empty, *parts]):
        torch.testing.assert_close(
            merge_group_norm_stats(order), group_norm_stats(x, 3), rtol=1e-12, atol=1e-9
        )


@pytest.mark.parametrize("shape", [(0, 8, 2, 3, 3), (2, 8, 0, 3, 3), (2, 8, 2, 3, 0)], ids=str)
@each_implementation
def test_empty(name, shape, generator):
    call = draw_call(generator, shape, 4)
    y, dx, dweight, dbias = run(name, call)
    assert y.shape == dx.shape == shape
    assert not dweight.any() and not dbias.any()
    with use(name, ROOM):
        assert group_norm_stats(call.x, 4).shape == (3, shape[0], 4)
        assert not group_norm_stats(call.x, 4).any()


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "frames apart": lambda t: (
        t.new_full((*t.shape[:2], 9, *t.shape[3:]), torch.nan)
        .contiguous(memory_format=torch.channels_last_3d)[:, :, 2:5]
        .copy_(t)
    ),
    "places apart": lambda t: t.new_full((*t.shape[:4], 2 * t.shape[4]), torch.nan)[..., ::2].copy_(
        t
    ),
    "channels apart": lambda t: last(torch.cat((t, t.flip(1)), dim=1))[:, : t.shape[1]],
    "off by one": lambda t: (
        t.new_full((t.numel() + 1,), torch.nan)[1:]
        .view(*t.movedim(1, -1).shape)
        .movedim(-1, 1)
        .copy_(t)
    ),
    "expanded": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_implementation
def test_layouts_do_not_matter(name, layout, generator):
    call = draw_call(generator, (2, 12, 3, 5, 4), 4, dtype=torch.bfloat16)
    awkward = replace(
        call.with_leaves([LAYOUTS[layout](call.x), call.weight[None].mT[:, 0], call.bias]),
        dy=LAYOUTS[layout](call.dy),
    )
    simple = replace(call, x=last(awkward.x), dy=last(awkward.dy))
    y, dx, *_ = results = run(name, awkward)
    assert_same(results, run(name, simple))
    for t in (y, dx):
        assert t.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("far", ["samples", "frames", "channels"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_memory_past_two_to_the_31(name, far, generator):
    shape = {"samples": (3, 4, 1, 1, 2), "frames": (1, 4, 3, 1, 2), "channels": (1, 3, 1, 1, 2)}
    call = draw_call(generator, shape[far], 1, dtype=torch.bfloat16)
    stride = list(call.x.stride())
    stride[["samples", "channels", "frames"].index(far)] = 2**30 + 64

    def distant(t):
        return far_apart(t.shape, stride).copy_(t)

    moved = replace(call, x=distant(call.x), dy=distant(call.dy))
    assert_same(run(name, moved), run(name, call))


@each_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: f"weights_{str(dtype)[6:]}")
@each_implementation
def test_weights_of_another_dtype_are_read_exactly(name, weight_dtype, dtype, generator):
    call = draw_call(generator, (1, 8, 1, 3, 3), 2, dtype=dtype, weight_dtype=weight_dtype)
    results, exact = run(name, call), plain(call, torch.float64)
    for got, true, like in zip(results, exact, (call.x, *call.leaves), strict=True):
        assert got.dtype == like.dtype
        torch.testing.assert_close(got.double(), true.to(got.dtype).double(), rtol=1e-2, atol=1e-3)
    error = (results[0].double() - exact[0]).abs()
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact[0].abs() + 1e-6).all()


@each_implementation
def test_nan_stays_in_its_group_of_its_sample(name, generator):
    call = draw_call(generator, (3, 8, 2, 3, 5), 4, dtype=torch.bfloat16)
    clean = run(name, call)
    call.x[1, 5, 1, 2, 3] = torch.nan
    y, dx, *_ = run(name, call)
    bad = torch.zeros(3, 8, dtype=torch.bool)
    bad[1, 4:6] = True
    for got, before in ((y, clean[0]), (dx, clean[1])):
        assert got[bad].isnan().all()
        assert_equal(got[~bad], before[~bad])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_implementations_agree_on_what_is_not_finite(value, generator):
    call = draw_call(generator, (2, 8, 1, 3, 5), 4)
    call.x[0, 1, 0, 2, 3] = value
    first, *others = (run(name, call)[:2] for name in ON_CPU)
    for other in others:
        for got, wanted in zip(other, first, strict=True):
            assert torch.equal(got.isnan(), wanted.isnan())


@each_implementation
def test_extreme_values_of_silu(name):
    """Where e^-z is zero or infinite; the statistics given are those of z itself."""
    x = torch.tensor([-torch.inf, -3e4, -200, -100, -20, 0, 20, 200, torch.inf])
    x = x.view(1, 1, 1, 1, -1)
    stats = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    ones, zeros = torch.ones(1), torch.zeros(1)
    with use(name, ROOM), torch.no_grad():
        y = group_norm_silu(x, 1, ones, zeros, eps=1e-12, stats=stats)
    expected = [0, 0, 0, -3.720076e-42, -4.1223073e-08, 0, 20, 200, torch.inf]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-40)


@each_implementation
def test_a_constant_map_is_the_bias(name, generator):
    call = draw_call(generator, (1, 8, 2, 3, 3), 2)
    flat = replace(call, x=torch.full_like(call.x, 1000.0))
    expected = F.silu(call.bias).view(1, -1, 1, 1, 1).expand_as(call.x)
    torch.testing.assert_close(run(name, flat)[0], expected, atol=1e-6, rtol=1e-6)


@each_fast
def test_the_same_bits_at_every_run(name, generator):
    call = draw_call(generator, (2, 24, 5, 30, 31), 8, dtype=torch.bfloat16)
    first = run(name, call)
    for _ in range(5):
        assert_same(run(name, call), first)


def of_sample(call: Call, index: int) -> Call:
    return replace(call, x=call.x[index : index + 1], dy=call.dy[index : index + 1])


@each_fast
def test_a_sample_does_not_know_its_batch(name, generator):
    call = draw_call(generator, (3, 16, 5, 30, 31), 4, dtype=torch.bfloat16)
    whole = run(name, call)
    for index in range(3):
        alone = run(name, of_sample(call, index))
        assert_equal(alone[0][0], whole[0][index])
        assert_equal(alone[1][0], whole[1][index])


def test_cpu_kernels_do_not_depend_on_the_number_of_threads(generator):
    pytest.importorskip("hunyuan_fast._C")
    call = draw_call(generator, (2, 24, 5, 30, 31), 8, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run("cpu_impl", call))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    pytest.importorskip("hunyuan_fast._C")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [__file__, __file__.replace(".py", "_large.py")]
        + ["-k", "(cpu_impl and (every_shape or statistics or extreme or nan)) or large"],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
