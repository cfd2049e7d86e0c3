"""Attention over valid prefixes: every implementation against the truth and against each other."""

import itertools

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_equal
from tests.ops.rope3d_attention_cases import (
    HALF,
    ROOM,
    Truth,
    answering,
    assert_close,
    draw_inputs,
    each_answer,
    judge,
    run,
)

SINGLE_AND_HALF = (torch.float32, torch.bfloat16)
NUM_VIDEO, NUM_TEXT = 33, 16
# Batches of 1 to 5 samples, neighbours alike or not; each entry is the number of valid text tokens.
TEXT_LENGTHS = [(0,), (16,), (9, 9), (0, 16), (1, 7), (0, 1, 16), (16, 16, 16), (5, 5, 0, 0, 1)]
# Every head size with more than a tile of queries and keys, and text of every kind: none, one
# token, some, all; no number of tokens is that of a tile.
HEAD_DIMS = {64: (0, 16), 80: (16, 1), 96: (1, 9), 128: (0, 16), 256: (7, 0)}


@each_answer(torch.float32, *HALF)
@pytest.mark.parametrize(
    ("head_dim", "length", "lengths"),
    [
        (64, 67, [67]),
        (80, 63, [63, 50]),
        (96, 65, [1, 65, 64]),
        (128, 201, [130, 199]),
        (256, 70, [69]),
        (64, 16, [0, 16]),
    ],
)
def test_as_accurate_as_its_precision_allows(name, dtype, head_dim, length, lengths, generator):
    inputs = draw_inputs((len(lengths), length, 2, head_dim), generator, dtype)
    results = run(name, inputs, lengths, head_dim**-0.5)
    judge(name, results, inputs, lengths, head_dim**-0.5)


@each_answer(torch.float32, *HALF)
def test_a_single_token_sees_itself(name, dtype, generator):
    inputs = draw_inputs((1, 1, 2, 8), generator, dtype)
    out, _, dq, dk, dv = run(name, inputs, [1], 8**-0.5)
    assert_close(out, inputs[2])
    assert_close(dv, inputs[3])
    for zero in (dq, dk):  # two sums of the same products, not in the same order
        assert zero.abs().max() < 2**-18


@each_answer(torch.bfloat16)
@pytest.mark.parametrize("sharpness", [6.0, 0.01])
def test_sharp_and_flat_scores(name, dtype, sharpness, generator):
    inputs = draw_inputs((2, 70, 2, 64), generator, dtype)
    inputs[0] *= sharpness
    judge(name, run(name, inputs, [70, 33], 0.125), inputs, [70, 33], 0.125)


@each_answer(*SINGLE_AND_HALF)
def test_large_values_do_not_overflow(name, dtype, generator):
    inputs = draw_inputs((1, 40, 1, 16), generator, dtype)
    inputs[0] *= 1e3
    inputs[1] *= 1e3
    for result in run(name, inputs, [40], 1.0):
        assert result.isfinite().all()


@each_answer(*HALF)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
def test_scores_far_below_zero(name, dtype, generator):
    """exp(-lse) is infinite then, and a kernel that takes it for padding makes NaN of it."""
    inputs = draw_inputs((2, 70, 1, 16), generator, dtype)
    inputs[0] = (inputs[0] * 0.1 + 4).to(dtype)
    inputs[1] = (inputs[1] * 0.1 - 4).to(dtype)
    results = run(name, inputs, [70, 33], 1.0)
    assert results[1][0].max() < -200
    judge(name, results, inputs, [70, 33], 1.0)


def each_against_each(inputs: list[Tensor], lengths: list[int], scale: float) -> None:
    """Forward by one, backward by another: outputs and log-sum-exp mean the same to all."""
    q, k, v, dout = inputs
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    truth = Truth.of(inputs, lengths, scale)
    names = answering(q.dtype)
    golden = {name: truth.emulated(name) for name in names}
    modules = implementations(ROOM)
    for first in names:
        out, lse = modules[first].forward(q, k, v, kv_len, scale)
        truth.judge_out(first, out, golden[first])
        truth.judge_lse(lse)
        for second in names:
            gradients = modules[second].backward(dout, out, lse, q, k, v, kv_len, scale)
            label = f"{second} after {first}"
            truth.judge_gradients(label, list(gradients), golden[second])


@pytest.mark.parametrize("text_lengths", TEXT_LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=["float32", "bfloat16"])
def test_implementations_agree_and_can_be_mixed(text_lengths, dtype, generator):
    shape = (len(text_lengths), NUM_VIDEO + NUM_TEXT, 2, 32)
    inputs = draw_inputs(shape, generator, dtype)
    each_against_each(inputs, [NUM_VIDEO + n for n in text_lengths], 32**-0.5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["float32", "bfloat16", "float16"])
def test_implementations_agree_at_every_head_size(head_dim, dtype, generator):
    """One head of 117 video and 16 text tokens: whole tiles of queries and keys, and a part."""
    inputs = draw_inputs((2, 133, 1, head_dim), generator, dtype)
    each_against_each(inputs, [117 + n for n in HEAD_DIMS[head_dim]], head_dim**-0.5)


@each_answer(*SINGLE_AND_HALF)
def test_no_lengths_mean_full_lengths(name, dtype, generator):
    inputs = draw_inputs((2, 37, 2, 16), generator, dtype)
    whole = run(name, inputs, None, 0.25)
    for result, expected in zip(run(name, inputs, [37, 37], 0.25), whole, strict=True):
        assert_equal(result, expected)
    judge(name, whole, inputs, [37, 37], 0.25)


@each_answer(*SINGLE_AND_HALF)
def test_a_sample_does_not_depend_on_its_batch(name, dtype, generator):
    inputs = draw_inputs((3, 41, 2, 32), generator, dtype)
    lengths = [41, 1, 29]
    together = run(name, inputs, lengths, 0.2)
    for item, length in enumerate(lengths):
        alone = run(name, [x[item : item + 1] for x in inputs], [length], 0.2)
        for result, expected in zip(together, alone, strict=True):
            assert_close(result[item : item + 1], expected)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_is_never_felt(name, dtype, garbage, generator):
    lengths = [0, 1, 20, 30]
    clean = draw_inputs((4, 30, 2, 16), generator, dtype)
    spoiled = [x.clone() for x in clean]
    for x, item in itertools.product(spoiled, range(4)):
        x[item, lengths[item] :] = garbage
    results = run(name, spoiled, lengths, 0.25)
    for result, expected in zip(results, run(name, clean, lengths, 0.25), strict=True):
        assert_equal(result, expected)


@each_answer(*SINGLE_AND_HALF)
def test_a_sample_without_tokens_is_zero(name, dtype, generator):
    inputs = draw_inputs((2, 9, 1, 8), generator, dtype)
    out, lse, *gradients = run(name, inputs, [0, 9], 1.0)
    for result in (out, *gradients):
        assert not result[0].any()
        assert result[1].any()
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_a_valid_row_stays_in_its_sample(name, dtype, bad, generator):
    inputs = draw_inputs((2, 12, 1, 8), generator, dtype)
    inputs[1][0, 3, 0, 2] = bad
    out = run(name, inputs, [12, 12], 1.0)[0]
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[23, 23], [23, 11]], ids=str)
def test_strides_do_not_matter(name, dtype, layout, lengths, generator):
    """Including the gradient of the output, which a concatenation or a sum hands back as a view."""
    inputs = [with_layout(x, layout) for x in draw_inputs((2, 23, 2, 16), generator, dtype)]
    results = run(name, inputs, lengths, 0.25)
    expected = run(name, [x.contiguous() for x in inputs], lengths, 0.25)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted)


@pytest.mark.parametrize("stride", [(2**30 + 8, 16, 16, 1), (16, 2**30 + 8, 16, 1)], ids=str)
@each_answer(torch.bfloat16)
def test_rows_and_samples_past_two_to_the_31(name, dtype, stride, generator):
    """Neither strides nor indices are past it, but their products are."""
    inputs = draw_inputs((3, 3, 1, 16), generator, dtype)
    far = [far_apart(x.shape, stride).copy_(x) for x in inputs]
    results = run(name, far, [2, 1, 3], 0.25)
    for result, wanted in zip(results, run(name, inputs, [2, 1, 3], 0.25), strict=True):
        assert_close(result, wanted)


@each_answer(torch.bfloat16)
def test_backward_is_deterministic(name, dtype, generator):
    inputs = draw_inputs((2, 50, 2, 32), generator, dtype)
    first = run(name, inputs, [50, 31], 0.2)
    for _ in range(5):
        for result, expected in zip(run(name, inputs, [50, 31], 0.2), first, strict=True):
            assert_equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [[333], [0, 333], [1, 200, 333]], ids=str)
@pytest.mark.parametrize("name", implementations(ROOM))
def test_on_a_gpu(name, dtype, head_dim, lengths, generator):
    inputs = draw_inputs((len(lengths), 333, 2, head_dim), generator, dtype, "cuda")
    for x, item in itertools.product(inputs, range(len(lengths))):
        x[item, lengths[item] :] = torch.nan
    kv_len = torch.tensor(lengths, device="cuda")
    reason = implementations(ROOM)[name].supports(*inputs[:3], kv_len, head_dim**-0.5)
    if reason is not None:
        pytest.skip(reason)
    results = run(name, inputs, lengths, head_dim**-0.5)
    judge(name, results, inputs, lengths, head_dim**-0.5)
    for result, expected in zip(run(name, inputs, lengths, head_dim**-0.5), results, strict=True):
        assert_equal(result, expected)
