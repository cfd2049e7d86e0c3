"""Queries of their own: other tokens than the keys', as many as there are; keys in parts."""

import pytest
import torch
from torch.library import opcheck

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.rope3d_attention import reference
from hunyuan_fast.kernels.rope3d_attention.shape_class import shape_class
from hunyuan_fast.ops import SlidingTiles, attention
from tests.kit import gpu
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import Fenced, poisoned_memory
from tests.kit.numerics import assert_equal
from tests.ops import rope3d_attention_parts as parts
from tests.ops.rope3d_attention_cases import (
    ROOM,
    answering,
    assert_close,
    draw_inputs,
    each_answer,
    judge,
    run,
)

SINGLE_AND_HALF = (torch.float32, torch.bfloat16)
# Lq, Lk, D, q_len, kv_len
CASES = [
    (67, 35, 64, [67], None),
    (22, 90, 80, [22, 7], [90, 64]),
    (71, 65, 96, [0, 71, 1, 64], [65, 0, 64, 65]),
    (130, 201, 128, [129], [199]),
    (1, 150, 40, [1, 1], [150, 2]),
    (64, 64, 32, [64, 30], [12, 64]),
]


def draw(queries, keys, shape, generator, dtype):
    """q, k, v and dout; queries, keys: how many of each sample are not NaN."""
    batch, num_queries, num_keys, head_dim = shape
    q, _, _, dout = draw_inputs((batch, num_queries, 2, head_dim), generator, dtype)
    k, v, *_ = draw_inputs((batch, num_keys, 2, head_dim), generator, dtype)
    for item in range(batch):
        for x, numbers in ((q, queries), (dout, queries), (k, keys), (v, keys)):
            if numbers is not None:
                x[item, numbers[item] :] = torch.nan
    return [q, k, v, dout]


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}x{case[1]}")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
def test_as_accurate_as_its_precision_allows(name, dtype, case, generator):
    """Whatever padding holds."""
    num_queries, num_keys, head_dim, queries, lengths = case
    shape = (len(queries), num_queries, num_keys, head_dim)
    inputs = draw(queries, lengths, shape, generator, dtype)
    scale = head_dim**-0.5
    with poisoned_memory():
        results = run(name, inputs, lengths, scale, queries)
    assert [x.shape[1] for x in (results[0], *results[2:])] == [num_queries] * 2 + [num_keys] * 2
    judge(name, results, inputs, lengths or [num_keys] * len(queries), scale, queries)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", implementations(ROOM))
def test_on_a_gpu(name, dtype, head_dim, generator):
    for num_queries, num_keys, _, queries, lengths in gpu.size(CASES, CASES[1:2]):
        shape = (len(queries), num_queries, num_keys, head_dim)
        inputs = [x.cuda() for x in draw(queries, lengths, shape, generator, dtype)]
        kv_len, q_len = (None if n is None else torch.tensor(n).cuda() for n in (lengths, queries))
        given = *inputs[:3], kv_len, head_dim**-0.5, None, q_len
        if reason := implementations(ROOM)[name].supports(*given):
            pytest.skip(reason)
        results = run(name, inputs, lengths, head_dim**-0.5, queries)
        judge(name, results, inputs, lengths or [num_keys] * len(queries), given[4], queries)


@each_answer(*SINGLE_AND_HALF)
def test_a_single_key(name, dtype, generator):
    inputs = draw([32], None, (1, 33, 1, 8), generator, dtype)
    out, _, dq, dk, dv = run(name, inputs, None, 8**-0.5, [32])
    assert_close(out[:, :32], inputs[2].expand(1, 32, 2, 8))
    assert_close(dv, inputs[3][:, :32].float().sum(1, keepdim=True).to(dtype))
    for zero in (dq, dk):  # two sums of the same products, not in the same order
        assert zero.abs().max() < 2**-16


@each_answer(*SINGLE_AND_HALF)
def test_queries_of_the_keys_tokens_are_no_other_case(name, dtype, generator):
    lengths = [37, 0, 5]
    inputs = draw(lengths, lengths, (3, 37, 37, 16), generator, dtype)
    expected = run(name, inputs, lengths, 0.25)
    for result, wanted in zip(run(name, inputs, lengths, 0.25, lengths), expected, strict=True):
        assert_equal(result, wanted)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parts_of_the_keys_come_to_the_whole(name, dtype, generator):
    """Forward of each, merged, and backward of each with what was merged."""
    parts.judge_parts(name, implementations(ROOM)[name], parts.draw_truth(generator, dtype))


@pytest.mark.parametrize("fault", parts.FAULTS)
def test_a_planted_fault_is_found(fault, generator):
    truth = parts.draw_truth(generator, torch.float32)
    with pytest.raises(AssertionError):
        parts.judge_parts("reference", parts.FAULTS[fault](reference), truth)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_saw_no_key_at_all_takes_no_part(name, dtype, generator):
    """Its log-sum-exp is -inf although there are keys here."""
    inputs = draw(None, None, (2, 19, 40, 16), generator, dtype)
    q, k, v, dout = inputs
    impl = implementations(ROOM)[name]
    kv_len, q_len = torch.tensor([40, 11]), torch.tensor([19, 7])
    out, lse = impl.forward(q, k, v, kv_len, 0.3, None, q_len)
    nothing = torch.zeros(19, dtype=torch.bool)
    nothing[[0, 3, 6]] = True
    out[:, nothing], lse[:, :, nothing] = 0, -torch.inf
    found = impl.backward(dout, out, lse, q, k, v, kv_len, 0.3, q_len)
    assert not found[0][:, nothing].any()
    # those rows stand last, past the end
    order = torch.tensor([1, 2, 4, 5, *range(7, 19), 0, 3, 6])
    moved = [x[:, order] for x in (dout, out)]
    shorter = torch.tensor([16, 4])
    expected = impl.backward(
        *moved, lse[:, :, order].contiguous(), q[:, order], k, v, kv_len, 0.3, shorter
    )
    assert_close(found[0][:, order], expected[0])
    for result, wanted in zip(found[1:], expected[1:], strict=True):
        assert_close(result, wanted)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_past_the_queries_is_not_read_in_backward(name, dtype, generator):
    """out and lse of merged parts may hold anything there."""
    q, k, v, dout = draw([5, 9], [21, 30], (2, 9, 30, 16), generator, dtype)
    impl = implementations(ROOM)[name]
    lengths = torch.tensor([21, 30]), 0.3
    q_len = torch.tensor([5, 9])
    out, lse = impl.forward(q, k, v, *lengths, None, q_len)
    expected = impl.backward(dout, out, lse, q, k, v, *lengths, q_len)
    out[0, 5:], lse[0, :, 5:] = torch.nan, torch.nan
    found = impl.backward(dout, out, lse, q, k, v, *lengths, q_len)
    for result, wanted in zip(found, expected, strict=True):
        assert_equal(result, wanted)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(name, dtype, layout, generator):
    inputs = draw(None, None, (2, 9, 23, 16), generator, dtype)
    inputs = [with_layout(x, layout) for x in inputs]
    results = run(name, inputs, [23, 11], 0.25, [3, 9])
    expected = run(name, [x.contiguous() for x in inputs], [23, 11], 0.25, [3, 9])
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted)


@each_answer(torch.bfloat16)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_lengths_may_lie_apart(name, dtype, generator):
    """As a column of a table, or one number for all samples."""
    q, k, v, dout = draw(None, None, (2, 9, 23, 16), generator, dtype)
    impl = implementations(ROOM)[name]
    table = torch.tensor([[23, 7], [11, 7], [99, 99]]).mT[0, :2], torch.tensor(7).expand(2)
    adjacent = [x.clone(memory_format=torch.contiguous_format) for x in table]
    results = []
    for kv_len, q_len in (table, adjacent):
        out, lse = impl.forward(q, k, v, kv_len, 0.25, None, q_len)
        results.append((out, lse, *impl.backward(dout, out, lse, q, k, v, kv_len, 0.25, q_len)))
    for result, wanted in zip(*results, strict=True):
        assert_equal(result, wanted)


@each_answer(*SINGLE_AND_HALF)
def test_out_may_be_a_view_beside_other_results(name, dtype, generator):
    q, k, v, _ = draw(None, None, (2, 19, 7, 8), generator, dtype)
    options = {"q_len": torch.tensor([19, 4]), "kv_len": torch.tensor([7, 0], dtype=torch.int32)}
    beside = Fenced((2, 19, 2 * 8), dtype, gap=40)
    view = beside.view.unflatten(-1, (2, 8))
    with use(name, ROOM):
        expected = attention(q, k, v, **options)
        assert attention(q, k, v, **options, out=view) is view
    beside.check()
    assert_equal(view, expected)


@pytest.mark.parametrize("num_queries", [0, 5])
@pytest.mark.parametrize("num_keys", [0, 5])
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=["float32", "bfloat16"])
def test_none_of_either(num_queries, num_keys, dtype, generator):
    inputs = draw(None, None, (2, num_queries, num_keys, 8), generator, dtype)
    *leaves, dout = inputs
    leaves = [x.requires_grad_() for x in leaves]
    q_len = torch.tensor([num_queries, 0])
    out, lse = attention(*leaves, q_len=q_len, return_lse=True)
    assert out.shape == leaves[0].shape and lse.shape == (2, 2, num_queries)
    seen = num_queries * num_keys > 0
    assert bool(out[0].any()) == seen and not out[1].any()
    assert lse[1].isneginf().all() and bool(lse[0].isneginf().all()) == (not seen)
    for gradient, leaf in zip(torch.autograd.grad(out, leaves, dout), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert bool(gradient[0].any()) == seen and not gradient[1].any()


def test_gradcheck(generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 2)
    leaves = draw(None, None, (3, 5, 4, 3), generator, torch.float64)[:3]
    lengths = {"q_len": torch.tensor([5, 3, 4]), "kv_len": torch.tensor([4, 3, 0])}
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **lengths, scale=0.7), leaves)


def test_registration(generator):
    q, k, v, dout = draw(None, None, (2, 6, 12, 8), generator, torch.bfloat16)
    lengths = torch.tensor([0, 7]), 0.3
    q_len = torch.tensor([6, 5])
    ops = torch.ops.hunyuan_fast
    out, lse = ops.attention(q, k, v, *lengths, q_len)
    opcheck(ops.attention_bwd.default, (dout, out, lse, q, k, v, *lengths, q_len))
    beside = torch.zeros(2, 6, 5, 8, dtype=q.dtype)[:, :, 1:3]
    opcheck(ops.attention_out.default, (q, k, v, *lengths, beside, q_len))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    opcheck(ops.attention.default, (*leaves, *lengths, q_len))


def test_the_class_of_a_call_is_that_of_as_many_scores():
    def tensor(length):
        return torch.zeros(2, length, 2, 8, device="meta")

    numbers = torch.zeros(2, dtype=torch.int32)
    q, k, square = tensor(100), tensor(6400), tensor(800)
    own = shape_class(q, k, k, None, 1.0, None, numbers)
    assert own == shape_class(square, square, square, numbers, 1.0)
    assert own != shape_class(square, square, square, None, 1.0)
    assert shape_class(q, k[:, :0], k[:, :0], None, 1.0, None, numbers)[2] == 0


def test_who_answers_on_the_cpu():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 9, 2, 8)
    q_len = torch.tensor([4])
    reasons = explain(ROOM, q, k, k, None, 1.0, None, q_len)
    assert reasons["library_impl"] is None
    empty = explain(ROOM, q, k[:, :0], k[:, :0], None, 1.0, None, q_len)
    assert "empty" in empty["library_impl"]
    assert "reference" in answering(torch.float32)


Q, K = torch.zeros(2, 5, 3, 4), torch.zeros(2, 7, 3, 4)
ALL = torch.tensor([5, 5])
REFUSALS = {
    "no q_len": ((Q, K, K), {"q_len": None}, ValueError, "k must have the shape of q"),
    "k of three dimensions": ((Q, K[0], K), {}, ValueError, r"k must be \(B, L, N, D\)"),
    "k of another batch": (
        (Q, K[:1], K[:1]),
        {},
        ValueError,
        r"k must have the shape of q, \(2, 7, 3, 4\), got \(1, 7, 3, 4\)",
    ),
    "k of other heads": ((Q, K[:, :, :2], K), {}, ValueError, "k must have the shape of q"),
    "v of another length": ((Q, K, Q), {}, ValueError, "v must have the shape of k"),
    "v of another dtype": ((Q, K, K.half()), {}, TypeError, "v must have the dtype of q"),
    "q_len of another batch": (
        (Q, K, K),
        {"q_len": ALL[:1]},
        ValueError,
        r"q_len must be \(B,\) = \(2,\), got shape \(1,\)",
    ),
    "q_len of floats": ((Q, K, K), {"q_len": ALL.float()}, TypeError, "q_len must be int32 or int"),
    "q_len elsewhere": ((Q, K, K), {"q_len": ALL.to("meta")}, ValueError, "q_len must be on the d"),
    "q_len too long": ((Q, K, K), {"q_len": ALL + 1}, ValueError, r"q_len must lie in \[0, L\] = "),
    "q_len negative": ((Q, K, K), {"q_len": ALL - 6}, ValueError, r"q_len must .* got \[-1, -1\]"),
    "kv_len too long": (
        (Q, K, K),
        {"kv_len": torch.tensor([7, 8])},
        ValueError,
        r"kv_len must lie in \[0, L\] = \[0, 7\]",
    ),
    "out of the keys' shape": (
        (Q, K, K),
        {"out": K.clone()},
        ValueError,
        "out must have the shape of q",
    ),
    "a pattern": (
        (Q, Q, Q),
        {"pattern": SlidingTiles((1, 1, 5), (1, 1, 1), [(1, 1, 1)] * 3)},
        ValueError,
        "q_len is for attention without a pattern",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case):
    arguments, options, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        attention(*arguments, **{"q_len": ALL, **options})
