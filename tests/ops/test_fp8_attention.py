"""Attention over e4m3 codes: codes bit for bit, outputs to their roundings, the op's contract."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.fp8_attention import reference
from hunyuan_fast.ops import attention, fp8_attention
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import Fenced, far_apart
from tests.kit.numerics import assert_equal
from tests.ops.fp8_attention_cases import (
    DTYPES,
    ROOM,
    answering,
    clean,
    draw_call,
    errors,
    judge,
    judge_codes,
    run,
    statistics,
    truth,
)

EVERYWHERE = answering()
CASES = {
    "few tokens": {"length": 9, "lengths": (2, 5)},
    "odd lengths": {"length": 67, "lengths": (67, 1)},
    "none and all": {"length": 40, "lengths": (0, 40), "heads": 1},
    "above a block of keys": {"length": 150, "lengths": (150, 129), "heads": 1},
    "D of 128": {"length": 131, "lengths": (131,), "head_dim": 128},
    "D of 48": {"length": 30, "lengths": (29,), "head_dim": 48},
    "features that stand out": {"length": 90, "lengths": (90,), "outliers": 10.0},
}

each_implementation = pytest.mark.parametrize("name", EVERYWHERE)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_case
@each_dtype
@each_implementation
def test_codes_bit_for_bit(name, dtype, case, generator):
    call = draw_call(generator, dtype=dtype, **CASES[case])
    known = statistics(call)
    judge_codes(name, implementations(ROOM)[name].quantize(*call.arguments, known), call, known)


@each_case
@each_dtype
@each_implementation
def test_statistics(name, dtype, case, generator):
    call = draw_call(generator, dtype=dtype, **CASES[case])
    known = implementations(ROOM)[name].statistics(call.k, call.v, call.kv_len)
    _, k, v = clean(call, torch.float64)
    for item, n in enumerate(call.lengths):
        keys, values = k[item, :n], v[item, :n]
        wanted = (keys.sum(0) / max(n, 1), values.sum(0) / max(n, 1))
        for got, mean in zip(known[:2], wanted, strict=True):
            torch.testing.assert_close(got[item].cpu(), mean.float(), rtol=1e-6, atol=1e-5)
        # of the mean at hand, exactly
        distance = (values.float() - known.value_mean[item].cpu()).abs()
        peak = distance.amax(0).clamp_min(2.0**-50) if n else torch.full_like(mean, 2.0**-50)
        assert torch.equal(known.value_peak[item].cpu(), peak.float())


@each_case
@each_dtype
@each_implementation
def test_as_accurate_as_its_roundings(name, dtype, case, generator):
    call = draw_call(generator, dtype=dtype, **CASES[case])
    judge(name, run(name, call), call)


@pytest.mark.parametrize("sharpness", [6.0, 0.01])
@each_implementation
def test_sharp_and_flat_scores(name, sharpness, generator):
    call = draw_call(generator, length=140, lengths=(140,))
    call = replace(call, scale=call.scale * sharpness)
    judge(name, run(name, call), call)


def test_implementations_exchange_statistics_and_codes(generator):
    call = draw_call(generator, length=140, lengths=(140, 70), heads=1, head_dim=128)
    modules = [implementations(ROOM)[name] for name in EVERYWHERE]
    for first, second, third in itertools.product(modules, repeat=3):
        known = first.statistics(call.k, call.v, call.kv_len)
        codes = second.quantize(*call.arguments, known)
        judge(third.__name__, third.attend(codes, call.kv_len, torch.empty_like(call.q)), call)


ACCURACY = {
    # what is drawn: cosine similarity at least, relative error at most
    "features that stand out": ({"outliers": 10.0}, 0.9999, 0.01),
    "biases alone": ({}, 0.9999, 0.012),
    "noise without any structure": ({"bias": 0.0}, 0.998, 0.06),
}


@pytest.mark.parametrize("kind", ACCURACY)
def test_similarity_to_exact_attention(kind, generator):
    """The worst kind is noise: nothing is left of it but what averaging leaves."""
    options, cosine, relative = ACCURACY[kind]
    call = draw_call(generator, length=512, lengths=(512,), head_dim=128, **options)
    got = errors(run("reference", call), call)
    assert got[0] >= cosine and got[1] <= relative, got


def test_centring_and_rotating_is_what_holds_outliers(generator, monkeypatch):
    call = draw_call(generator, length=512, lengths=(512,), head_dim=128, outliers=10.0)
    known = statistics(call)
    uncentred = known._replace(key_mean=torch.zeros_like(known.key_mean))

    def error(known: reference.Statistics) -> float:
        codes = reference.quantize(*call.arguments, known)
        return errors(reference.attend(codes, call.kv_len, torch.empty_like(call.q)), call)[1]

    whole = error(known)
    monkeypatch.setattr(reference, "rotate", lambda x: x * 128**0.5)
    assert error(known) > 1.4 * whole
    assert error(uncentred) > 1.6 * whole


@each_implementation
@pytest.mark.parametrize("step", [0, 2])
def test_lengths_of_any_stride(name, step, generator):
    """A column of a table, or one number for all."""
    call = draw_call(generator, length=9, lengths=(5, 5 if step == 0 else 9), heads=1)
    apart = torch.tensor([5, 0, call.lengths[1]], dtype=torch.int32).as_strided((2,), (step,))
    assert apart.tolist() == list(call.lengths)
    with use(name, ROOM):
        expected = fp8_attention(*call.tensors, kv_len=call.kv_len, scale=call.scale)
        found = fp8_attention(*call.tensors, kv_len=apart, scale=call.scale)
    assert_equal(found, expected)


@each_implementation
def test_no_lengths_mean_full_lengths(name, generator):
    call = draw_call(generator, length=37, lengths=(37, 37))
    with use(name, ROOM):
        whole = fp8_attention(*call.tensors, scale=call.scale)
        assert_equal(whole, fp8_attention(*call.tensors, scale=call.scale, kv_len=call.kv_len))
    judge(name, whole, call)


@each_implementation
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_is_never_felt(name, garbage, generator):
    call = draw_call(generator, length=40, lengths=(0, 1, 20, 40), heads=1)
    valid = torch.arange(40) < torch.tensor(call.lengths)[:, None]
    spoiled = call.map(lambda x: torch.where(valid[..., None, None], x, garbage))
    zeroed = call.map(lambda x: torch.where(valid[..., None, None], x, 0.0))
    result = run(name, spoiled)
    assert_equal(result, run(name, zeroed))
    assert not result[~valid].any()


@each_implementation
def test_a_sample_does_not_depend_on_its_batch(name, generator):
    call = draw_call(generator, length=41, lengths=(41, 1, 29), heads=1)
    together = run(name, call)
    for item, n in enumerate(call.lengths):
        alone = replace(call.map(lambda x, item=item: x[item : item + 1]), lengths=(n,))
        assert_equal(together[item : item + 1], run(name, alone))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")  # numpy, interpreting
@each_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_head(name, which, bad, generator):
    call = draw_call(generator, length=12, lengths=(12, 12), dtype=torch.float32)
    call.tensors[which][0, 3, 1, 2] = bad
    out = run(name, call)
    assert not out[0, 3, 1].isfinite().all()
    assert out[1].isfinite().all() and out[0, :, 0].isfinite().all()


@each_implementation
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4])
def test_sizes_far_from_one(name, size, generator):
    """Scales follow; what is too small for any code becomes the mean of the values, not NaN."""
    call = draw_call(generator, length=20, lengths=(20,), dtype=torch.float32)
    call = replace(call.map(lambda x: x * size), scale=call.scale / max(size, 1.0) ** 2)
    out, exact = run(name, call).double(), truth(call)
    assert out.isfinite().all()
    assert (out - exact).norm() <= 0.1 * exact.norm()


@each_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(name, layout, generator):
    call = draw_call(generator, length=23, lengths=(23, 11))
    strided = call.map(lambda x: with_layout(x, layout))
    assert_equal(run(name, strided), run(name, strided.map(Tensor.contiguous)))


@each_implementation
def test_features_need_not_be_adjacent(name, generator):
    call = draw_call(generator, length=20, lengths=(20,))
    across = call.map(lambda x: x.transpose(1, 3).contiguous().transpose(1, 3))
    assert_equal(run(name, across), run(name, call))


@pytest.mark.parametrize("stride", [(2**31 + 8, 64, 64, 1), (64, 2**31 + 8, 64, 1)], ids=str)
@each_implementation
def test_rows_and_samples_past_two_to_the_31(name, stride, generator):
    batch, length = (2, 1) if stride[0] > stride[1] else (1, 2)
    call = draw_call(generator, length=length, lengths=(length,) * batch, heads=1)
    far = call.map(lambda x: far_apart(x.shape, stride).copy_(x))
    assert_equal(run(name, far), run(name, call))


@each_implementation
def test_out_may_be_a_view_beside_other_results(name, generator):
    call = draw_call(generator, length=19, lengths=(19, 7), dtype=torch.float32)
    beside = Fenced((2, 19, 2 * 64), torch.float32, gap=40)
    view = beside.view.unflatten(-1, (2, 64))
    with use(name, ROOM):
        options = {"kv_len": call.kv_len, "scale": call.scale}
        expected = fp8_attention(*call.tensors, **options)
        assert fp8_attention(*call.tensors, **options, out=view) is view
    beside.check()
    assert_equal(view, expected)


@each_implementation
def test_the_same_bits_at_every_run(name, generator):
    call = draw_call(generator, length=140, lengths=(140,), heads=1)
    assert_equal(run(name, call), run(name, call))


@pytest.mark.parametrize("rows", [16, 64])
def test_the_reference_does_not_depend_on_its_rows(rows, generator, monkeypatch):
    call = draw_call(generator, length=150, lengths=(150, 90), dtype=torch.float32)
    whole = run("reference", call)
    monkeypatch.setattr(reference, "ROWS", rows)
    torch.testing.assert_close(run("reference", call), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64)], ids=str)
def test_empty_tensors(shape):
    q = torch.empty(shape)
    kv_len = torch.zeros(shape[0], dtype=torch.int32)
    assert fp8_attention(q, q, q, kv_len=kv_len).shape == shape


@pytest.mark.parametrize("lengths", [None, (0, 7)], ids=str)
@each_implementation
def test_registration(name, lengths, generator):
    call = draw_call(generator, length=12, lengths=lengths or (12, 12))
    kv_len = None if lengths is None else call.kv_len
    ops = torch.ops.hunyuan_fast
    with use(name, ROOM):
        opcheck(ops.fp8_attention.default, (*call.tensors, kv_len, call.scale))
        beside = torch.zeros(2, 12, 5, 64, dtype=call.q.dtype)[:, :, 1:3]
        opcheck(ops.fp8_attention_out.default, (*call.tensors, kv_len, call.scale, beside))


def test_compiles_whole(generator):
    call = draw_call(generator, length=21, lengths=(21, 9))
    compiled = torch.compile(fp8_attention, fullgraph=True, backend="aot_eager")
    options = {"kv_len": call.kv_len, "scale": call.scale}
    assert_equal(compiled(*call.tensors, **options), fp8_attention(*call.tensors, **options))


def test_the_reference_answers_on_the_cpu(generator):
    arguments = draw_call(generator).arguments
    assert explain(ROOM, *arguments)["reference"] is None
    assert explain(ROOM, *reference.example(torch.device("cpu")))["reference"] is None
    q, k, v = (torch.randn(1, 9, 2, 64, generator=generator) for _ in range(3))
    exact = attention(q, k, v)
    torch.testing.assert_close(fp8_attention(q, k, v), exact, rtol=0.1, atol=0.1)


Q = torch.zeros(2, 5, 3, 64)
GRAD = Q.clone().requires_grad_()
REFUSALS = {
    "k of another length": ((Q, Q[:, :4], Q), {}, ValueError, "k must have the shape of q"),
    "float64": ((Q.double(),) * 3, {}, TypeError, "q must be bfloat16, float16 or float32"),
    "kv_len of floats": ((Q, Q, Q), {"kv_len": torch.zeros(2)}, TypeError, "int32 or int64"),
    "kv_len too long": ((Q, Q, Q), {"kv_len": torch.tensor([6, 0])}, ValueError, r"\[0, 5\]"),
    "scale of zero": ((Q, Q, Q), {"scale": 0.0}, ValueError, "scale must be positive"),
    "scale of NaN": ((Q, Q, Q), {"scale": torch.nan}, ValueError, "scale must be positive"),
    "out of another shape": ((Q, Q, Q), {"out": Q[:1]}, ValueError, "out must have the shape"),
    "out that wants a gradient": ((Q, Q, Q), {"out": GRAD}, ValueError, "out is for inference"),
    "training": ((GRAD, Q, GRAD), {}, ValueError, "for inference and has no gradients, q and v"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case):
    arguments, options, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        fp8_attention(*arguments, **options)


def test_tensors_that_could_have_gradients_are_taken_without():
    with torch.no_grad():
        assert not fp8_attention(GRAD, GRAD, GRAD).requires_grad
