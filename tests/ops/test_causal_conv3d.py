"""The causal convolutions: every implementation against the definition, in float64."""

import itertools

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.causal_conv3d import library_impl, reference
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.numerics import assert_equal
from tests.ops.causal_conv3d_cases import (
    DTYPES,
    FACTORS,
    ONES,
    QUICK,
    ROOM,
    STRIDES,
    apply,
    assert_right,
    by_definition,
    channels_last,
    differentiate,
    draw_call,
    run,
    skip_unless_taken,
)

each_implementation = pytest.mark.parametrize("name", QUICK)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SIZES = ((5, 6), (1, 7), (4, 1), (1, 1), (2, 3), (8, 8))


@pytest.fixture(params=["3D", "2D"])
def form(request, monkeypatch):
    """Both forms of the library's convolution: torch's in 3D, and a 2D one for each frame."""
    limit = 0 if request.param == "3D" else 10**9
    monkeypatch.setattr(library_impl, "_SLOW_CONV3D_LIMIT", limit)


@pytest.mark.parametrize("past", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [*STRIDES, (3, 1, 2)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5, (1, 3, 3), (2, 1, 3)], ids=str)
def test_implementations_agree_with_the_definition(kernel, stride, frames, past, generator, form):
    taps = kernel if isinstance(kernel, int) else kernel[0]
    if past is not None and past + frames < taps:
        pytest.skip("fewer frames than taps")
    size = SIZES[(frames + taps) % len(SIZES)]
    shape = (1 + frames % 2, 3, frames, *size)
    options = {"kernel": kernel, "stride": stride, "past": past, "dtype": torch.float64}
    call = draw_call(generator, shape=shape, **options)
    expected = differentiate(by_definition, call)
    for name in QUICK:
        if implementations(ROOM)[name].supports(*call.arguments) is None:
            for got, wanted in zip(run(name, call), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("past", [None, 1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_upsampling_agrees_with_the_definition(factor, frames, past, generator, form):
    if past == factor[0] == 2:
        pytest.skip("one frame is all that a doubled clip looks back")
    size = SIZES[(frames + factor[1]) % len(SIZES)]
    shape = (1 + frames % 2, 3, frames, *size)
    call = draw_call(generator, shape=shape, factor=factor, past=past, dtype=torch.float64)
    expected = differentiate(by_definition, call)
    for name in QUICK:
        if implementations(ROOM)[name].supports(*call.arguments) is None:
            for got, wanted in zip(run(name, call), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


PLAIN = [
    # kernel, stride, frames, size, past
    (3, ONES, 4, (5, 6), None),
    (3, ONES, 2, (1, 7), 2),
    (3, ONES, 1, (6, 5), None),
    (3, ONES, 1, (4, 1), 2),
    (3, (1, 2, 2), 3, (5, 6), None),
    (3, (1, 2, 2), 1, (7, 8), None),
    (3, (2, 2, 2), 5, (4, 7), None),
    (3, (2, 2, 2), 3, (6, 1), 1),
    (1, ONES, 3, (5, 4), None),
    (1, (1, 2, 2), 2, (5, 4), 0),
    (1, (2, 2, 2), 4, (3, 4), None),
    (3, (2, 2, 2), 4, (1, 1), 2),
]


@each_dtype
@pytest.mark.parametrize(("kernel", "stride", "frames", "size", "past"), PLAIN, ids=str)
@each_implementation
def test_as_accurate_as_its_precision(name, kernel, stride, frames, size, past, dtype, generator):
    options = {"kernel": kernel, "stride": stride, "past": past, "dtype": dtype}
    call = draw_call(generator, shape=(2, 19, frames, *size), channels=21, **options)
    assert_right(run(name, call), call)


@each_dtype
@pytest.mark.parametrize("past", [None, 1, 2])
@pytest.mark.parametrize(
    ("factor", "frames", "size"),
    [
        ((2, 2, 2), 3, (3, 4)),
        ((2, 2, 2), 1, (1, 5)),
        ((1, 2, 2), 2, (4, 1)),
        ((1, 2, 2), 1, (2, 3)),
        ((2, 1, 1), 2, (1, 1)),
    ],
    ids=str,
)
@each_implementation
def test_upsampling_as_accurate(name, factor, frames, size, past, dtype, generator):
    if past == factor[0] == 2:
        pytest.skip("one frame is all that a doubled clip looks back")
    shape = (1, 18, frames, *size)
    call = draw_call(generator, shape=shape, channels=17, factor=factor, past=past, dtype=dtype)
    assert_right(run(name, call), call)


@each_dtype
@each_implementation
def test_many_channels(name, dtype, generator):
    """Sums of 6912 products, in 3D and in phases."""
    call = draw_call(generator, shape=(1, 256, 6, 14, 12), channels=32, dtype=dtype)
    assert_right(run(name, call), call)
    options = {"channels": 32, "factor": (2, 2, 2), "dtype": dtype}
    call = draw_call(generator, shape=(1, 256, 3, 6, 5), **options)
    assert_right(run(name, call), call)


@each_implementation
def test_random_calls(name, generator):
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(15):
        shape = tuple(number(1, n) for n in (2, 40, 5, 9, 9))
        past = None if number(0, 1) else 2
        if number(0, 1):
            options = {"stride": STRIDES[number(0, 2)], "kernel": 3 if number(0, 2) else 1}
        else:
            options = {"factor": FACTORS[number(0, 4)]}
            past = past and 3 - options["factor"][0]
        dtype = DTYPES[number(0, 2)]
        call = draw_call(
            generator, shape=shape, channels=number(1, 40), past=past, dtype=dtype, **options
        )
        assert_right(run(name, call), call)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1, 1), (1, 2, 3, 1), (3, 4), (2, 5)], ids=str)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@each_implementation
def test_chunks_of_a_clip_equal_the_whole(name, stride, chunks, generator):
    call = draw_call(generator, shape=(2, 5, 7, 6, 5), stride=stride)
    starts = list(itertools.accumulate(chunks, initial=0))
    # before the clip stands its first frame, twice
    extended = torch.cat([call.x[:, :, :1]] * 2 + [call.x], dim=2)
    with use(name, ROOM):
        whole = apply(call)
        parts = []
        for start, end in itertools.pairwise(starts):
            first = -(-start // stride[0]) * stride[0]  # of the next output's own frame
            if first >= end:
                continue  # the chunk ends before it
            past = extended[:, :, first : start + 2] if start else None
            chunk = call.x[:, :, start:end]
            y = causal_conv3d(chunk, call.weight, call.bias, stride=stride, past=past)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (1, 2, 2), (3, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@each_implementation
def test_chunks_of_an_upsampled_clip_equal_the_whole(name, factor, chunks, generator):
    call = draw_call(generator, shape=(2, 5, 5, 3, 4), factor=factor)
    starts = itertools.accumulate(chunks, initial=0)
    with use(name, ROOM):
        whole = apply(call)
        parts = []
        for start, end in itertools.pairwise(starts):
            past = call.x[:, :, max(0, start - 3 + factor[0]) : start] if start else None
            chunk = call.x[:, :, start:end]
            parts.append(
                upsample_causal_conv3d(chunk, call.weight, call.bias, factor=factor, past=past)
            )
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("past", [None, 2])
@each_implementation
def test_the_future_has_no_influence(name, past, generator):
    call = draw_call(generator, shape=(1, 3, 4, 3, 4), past=past)
    spoiled = call.x.clone()
    spoiled[:, :, 2:] = torch.nan
    with use(name, ROOM):
        y = causal_conv3d(call.x, call.weight, past=call.past)
        other = causal_conv3d(spoiled, call.weight, past=call.past)
        assert_equal(other[:, :, :2], y[:, :, :2])
        assert other[:, :, 2:].isnan().any()
        small = upsample_causal_conv3d(call.x, call.weight, factor=(2, 2, 2))
        other = upsample_causal_conv3d(spoiled, call.weight, factor=(2, 2, 2))
        assert_equal(other[:, :, :3], small[:, :, :3])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_implementation
def test_bad_values_reach_their_neighbours_only(name, bad, generator):
    call = draw_call(generator, shape=(2, 3, 3, 5, 6))
    call.x[0, 1, 1, 4, 2] = bad
    with use(name, ROOM):
        y = apply(call)
    assert not y[0, :, 1:, 3:, 1:4].isfinite().any()
    y[0, :, 1:, 3:, 1:4] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{"past": 2}, {"stride": (2, 2, 2)}, {"factor": (2, 2, 2), "past": 1}, {"kernel": 1}],
    ids=str,
)
@each_implementation
def test_strides_do_not_matter(name, options, layout, generator):
    """Including those of the incoming gradient."""
    call = draw_call(generator, shape=(2, 5, 3, 4, 3), **options)
    awkward = call.map(lambda t: with_layout(t.contiguous(), layout) if t.dim() > 1 else t)
    expected = run(name, awkward.map(lambda t: channels_last(t) if t.dim() == 5 else t))
    for got, wanted in zip(run(name, awkward), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@each_implementation
def test_layouts_of_memory(name, generator):
    """Contiguous and channels-last maps and weights, and a part of wider channels."""
    call = draw_call(generator, shape=(1, 8, 3, 4, 5), channels=8)
    expected = run(name, call)
    wide = channels_last(torch.randn(1, 20, 3, 4, 5, generator=generator))
    wide[:, 4:12] = call.x
    changes = (torch.Tensor.contiguous, lambda t: channels_last(t) if t.dim() == 5 else t)
    calls = [call.map(change) for change in changes]
    calls.append(call.map(lambda t: wide[:, 4:12] if t is call.x else t))
    for other in calls:
        for got, wanted in zip(run(name, other), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@each_implementation
def test_a_sample_does_not_depend_on_its_batch(name, generator):
    call = draw_call(generator, shape=(3, 4, 2, 4, 3))
    together = run(name, call)
    for item in range(3):
        part = slice(item, item + 1)
        single = call.map(lambda t, part=part: t[part] if t.dim() == 5 and len(t) == 3 else t)
        alone = run(name, single)
        for index in (0, 1):
            torch.testing.assert_close(together[index][part], alone[index], rtol=1e-5, atol=1e-5)


@each_implementation
def test_without_a_bias(name, generator):
    call = draw_call(generator, shape=(1, 3, 2, 3, 4), bias=False)
    assert_right(run(name, call), call)
    call = draw_call(generator, shape=(1, 3, 2, 3, 4), bias=False, factor=(2, 2, 2))
    assert_right(run(name, call), call)


@each_implementation
def test_results_are_the_same_every_time(name, generator):
    for options in ({"past": 2}, {"factor": (2, 2, 2)}):
        call = draw_call(generator, shape=(1, 20, 3, 4, 3), dtype=torch.bfloat16, **options)
        first = run(name, call)
        for got, wanted in zip(run(name, call), first, strict=True):
            assert (got is None and wanted is None) or torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("past", [None, 1, 2])
@each_implementation
def test_activation_and_residual_at_inference(name, past, dtype, generator):
    """Against the same in three steps, for x and past alike."""
    skip_unless_taken(name, dtype)
    call = draw_call(generator, shape=(2, 6, 3, 4, 5), past=past, dtype=dtype)
    scale, shift = (torch.randn(2, 6, generator=generator) for _ in range(2))
    residual = torch.randn(call.dy.shape, generator=generator).to(dtype)

    def activated(t):
        gain, offset = (v.double()[:, :, None, None, None] for v in (scale, shift))
        return torch.nn.functional.silu(t.double() * gain + offset).to(dtype)

    steps = call.map(lambda t: channels_last(activated(t)) if t is call.x or t is call.past else t)
    exact = by_definition(steps.map(torch.Tensor.double)) + residual.double()
    own = by_definition(steps) + residual
    with use(name, ROOM), torch.no_grad():
        y = causal_conv3d(
            *(call.x, call.weight, call.bias),
            past=call.past,
            scale=scale,
            shift=shift,
            residual=residual,
        )
        bare = causal_conv3d(call.x, call.weight, past=call.past, residual=residual)
    # in fp32 only the order of summation is left to compare, and it is anyone's
    factor = 4 if dtype == torch.float32 else 2
    assert (y.double() - exact).abs().max() <= factor * (own.double() - exact).abs().max()
    expected = by_definition(call.map(torch.Tensor.double)) + residual.double()
    expected -= call.bias.double().view(1, -1, 1, 1, 1)
    torch.testing.assert_close(bare.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"past": None},
        {"past": 2},
        {"stride": (2, 2, 2)},
        {"factor": (2, 2, 2)},
        {"factor": (2, 2, 2), "past": 1},
        {"factor": (1, 2, 2), "past": 1},
    ],
    ids=str,
)
@each_implementation
def test_gradcheck(name, options, generator):
    skip_unless_taken(name, torch.float64)
    call = draw_call(generator, shape=(1, 2, 2, 3, 2), channels=2, dtype=torch.float64, **options)
    leaves = [t.requires_grad_() for t in call.leaves if t is not None]

    def function(x, weight, bias, past=None):
        if call.factor is None:
            return causal_conv3d(x, weight, bias, stride=call.stride, past=past)
        return upsample_causal_conv3d(x, weight, bias, factor=call.factor, past=past)

    with use(name, ROOM):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("first", QUICK)
@pytest.mark.parametrize("second", QUICK)
def test_forward_by_one_and_backward_by_another(first, second, generator):
    call = draw_call(generator, shape=(1, 4, 2, 3, 4), factor=(2, 2, 2))
    modules = implementations(ROOM)
    x, weight, _, stride, past, factor = call.arguments
    y = modules[first].forward(*call.arguments)
    wants = (True, True, True, False)
    gradients = modules[second].backward(call.dy, x, weight, stride, past, factor, wants)
    assert_right([y, *gradients], call)


def test_an_empty_batch():
    x, weight = torch.empty(0, 3, 2, 4, 4, requires_grad=True), torch.randn(5, 3, 3, 3, 3)
    y = causal_conv3d(x, weight, stride=(1, 2, 2))
    assert y.shape == (0, 5, 2, 2, 2)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert upsample_causal_conv3d(x, weight, factor=(2, 2, 2)).shape == (0, 5, 3, 8, 8)


def test_small_and_large_maps_agree(generator):
    """torch changes its kernel at a size of its own; what it computes must not change."""
    x = torch.randn(1, 16, 12, 40, 6, generator=generator)
    weight = torch.randn(8, 16, 3, 3, 3, generator=generator)
    few = causal_conv3d(x[:, :, :, :30], weight)[:, :, :, :29]
    many = causal_conv3d(x, weight)[:, :, :, :29]
    torch.testing.assert_close(few, many, atol=2e-4, rtol=1e-5)


def test_the_library_answers_on_the_cpu():
    assert explain(ROOM, *reference.example(torch.device("cpu")))["library_impl"] is None
    x = torch.zeros(1, 2, 3, 4, 4)
    assert "got" not in (library_impl.supports(x, x) or "")
    assert "it is on meta" in library_impl.supports(x.to("meta"), x)
    assert "must have samples" in library_impl.supports(x[:0], x)
