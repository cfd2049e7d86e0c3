"""Attention over valid prefixes as an operator: gradients, views, registration, refusals."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from hunyuan_fast.dispatch import explain, use
from hunyuan_fast.kernels.rope3d_attention import library_impl, reference
from hunyuan_fast.ops.rope3d_attention import attention
from tests.kit.memory import Fenced
from tests.kit.numerics import assert_equal
from tests.ops.rope3d_attention_cases import ROOM, draw_inputs, each_answer, run

SINGLE_AND_HALF = (torch.float32, torch.bfloat16)


def test_gradient_of_a_sum_is_an_expanded_zero_stride_tensor(generator):
    q, k, v, _ = draw_inputs((1, 9, 2, 8), generator)
    q.requires_grad_()
    attention(q, k, v).sum().backward()
    (expected,) = torch.autograd.grad(attention(q, k, v), q, torch.ones(1, 9, 2, 8))
    assert_equal(q.grad, expected)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.parametrize("lengths", [None, [19, 19], [19, 0], [7, 7]], ids=str)
def test_out_may_be_a_view_beside_other_results(name, dtype, lengths, generator):
    q, k, v, _ = draw_inputs((2, 19, 3, 8), generator, dtype)
    kv_len = None if lengths is None else torch.tensor(lengths)
    beside = Fenced((2, 19, 3 * 8), dtype, gap=40)
    view = beside.view.unflatten(-1, (3, 8))
    with use(name, ROOM):
        expected, expected_lse = attention(q, k, v, kv_len=kv_len, return_lse=True)
        result, lse = attention(q, k, v, kv_len=kv_len, out=view, return_lse=True)
    assert result is view
    beside.check()
    assert_equal(view, expected)
    assert_equal(lse, expected_lse)


@each_answer(*SINGLE_AND_HALF)
def test_out_may_have_its_features_apart(name, dtype, generator):
    q, k, v, _ = draw_inputs((1, 5, 2, 8), generator, dtype)
    across = torch.empty(1, 8, 2, 5, dtype=dtype).transpose(1, 3)
    with use(name, ROOM):
        assert attention(q, k, v, out=across) is across
        assert_equal(across, attention(q, k, v))


@each_answer(torch.float64)
@pytest.mark.parametrize("lengths", [None, [5, 3, 0]], ids=str)
def test_gradcheck(name, dtype, lengths, generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 2)
    shape = (3, 5, 2, 3)
    q, k, v, _ = draw_inputs(shape, generator, dtype)
    kv_len = None if lengths is None else torch.tensor(lengths)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with use(name, ROOM):
        assert torch.autograd.gradcheck(lambda *x: attention(*x, kv_len=kv_len, scale=0.7), leaves)


def test_reference_does_not_depend_on_its_blocks(generator, monkeypatch):
    inputs = draw_inputs((2, 21, 2, 8), generator, torch.float64)
    whole = run("reference", inputs, [21, 13], 0.5)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 4)
    for result, expected in zip(run("reference", inputs, [21, 13], 0.5), whole, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


@each_answer(*SINGLE_AND_HALF)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_need_no_gradient(name, dtype, needed, generator):
    q, k, v, dout = draw_inputs((1, 11, 2, 8), generator, dtype)
    expected = run(name, [q, k, v, dout], [11], 8**-0.5)[2:]
    leaves = [q, k, v]
    for i in needed:
        leaves[i].requires_grad_()
    with use(name, ROOM):
        gradients = torch.autograd.grad(attention(*leaves), [leaves[i] for i in needed], dout)
    for i, gradient in zip(needed, gradients, strict=True):
        assert_equal(gradient, expected[i])


def test_log_sum_exp_carries_no_gradient(generator):
    q, k, v, _ = draw_inputs((1, 5, 1, 4), generator)
    out, lse = attention(q.requires_grad_(), k, v, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
def test_empty_tensors(shape):
    q = torch.empty(shape, requires_grad=True)
    out, lse = attention(q, q, q, kv_len=torch.zeros(shape[0], dtype=torch.int32), return_lse=True)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])
    out.sum().backward()
    assert q.grad.shape == shape


@pytest.mark.parametrize("lengths", [None, [12, 12], [0, 7]], ids=str)
@each_answer(*SINGLE_AND_HALF)
def test_registration(name, dtype, lengths, generator):
    q, k, v, dout = draw_inputs((2, 12, 2, 8), generator, dtype)
    kv_len = None if lengths is None else torch.tensor(lengths)
    ops = torch.ops.hunyuan_fast
    with use(name, ROOM):
        out, lse = ops.attention(q, k, v, kv_len, 0.3)
        beside = torch.zeros(2, 12, 5, 8, dtype=dtype)[:, :, 1:3]
        opcheck(ops.attention_bwd.default, (dout, out, lse, q, k, v, kv_len, 0.3))
        opcheck(ops.attention_out.default, (q, k, v, kv_len, 0.3, beside))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        opcheck(ops.attention.default, (*leaves, kv_len, 0.3))


def test_torch_answers_on_the_cpu(generator):
    q, k, v, _ = draw_inputs((1, 5, 1, 4), generator)
    assert explain(ROOM, q, k, v, None, 0.5)["library_impl"] is None
    assert explain(ROOM, *reference.example(torch.device("cpu")))["reference"] is None


def test_the_library_says_why_it_declines():
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)

    def reason(x: Tensor) -> str | None:
        return library_impl.supports(x, x, x, None, 1.0)

    assert reason(q) is None
    assert "adjacent" in reason(q.transpose(-1, -2))
    assert "empty" in reason(q[:0])
    assert "got meta" in reason(q.to("meta"))
    with FakeTensorMode():
        assert reason(torch.empty(1, 8, 2, 64, dtype=q.dtype, device="cuda")) is None
        assert "got 60" in reason(torch.empty(1, 8, 2, 60, dtype=q.dtype, device="cuda"))
        assert "got 264" in reason(torch.empty(1, 8, 2, 264, dtype=q.dtype, device="cuda"))
        assert "got torch.float32" in reason(torch.empty(1, 8, 2, 64, device="cuda"))
    with use("library_impl", ROOM), pytest.raises(RuntimeError, match="adjacent"):
        attention(*[q.transpose(-1, -2)] * 3)


def tensor(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **options)


Q = tensor(2, 5, 3, 4)
REFUSALS = {
    "q of three dimensions": ((Q[0], Q, Q), {}, ValueError, r"q must be \(B, L, N, D\)"),
    "k of another length": ((Q, Q[:, :4], Q), {}, ValueError, "k must have the shape of q"),
    "v of another batch": ((Q, Q, Q[:1]), {}, ValueError, "v must have the shape of q"),
    "k of another dtype": ((Q, Q.half(), Q), {}, TypeError, "k must have the dtype of q"),
    "v elsewhere": ((Q, Q, Q.to("meta")), {}, ValueError, "v must be on the device of q, cpu"),
    "integers": ((Q.int(), Q.int(), Q.int()), {}, TypeError, "floating-point"),
    "no features": ((Q[..., :0],) * 3, {}, ValueError, "at least 1"),
    "kv_len of another batch": (
        (Q, Q, Q),
        {"kv_len": torch.tensor([5])},
        ValueError,
        r"kv_len must be \(B,\) = \(2,\)",
    ),
    "kv_len of floats": ((Q, Q, Q), {"kv_len": tensor(2)}, TypeError, "int32 or int64"),
    "kv_len elsewhere": (
        (Q, Q, Q),
        {"kv_len": tensor(2, dtype=torch.int32, device="meta")},
        ValueError,
        "kv_len must be on the device",
    ),
    "kv_len too long": ((Q, Q, Q), {"kv_len": torch.tensor([6, 0])}, ValueError, r"\[0, 5\]"),
    "kv_len negative": ((Q, Q, Q), {"kv_len": torch.tensor([-1, 5])}, ValueError, r"\[0, 5\]"),
    "out of another shape": ((Q, Q, Q), {"out": Q[:1]}, ValueError, "out must have the shape"),
    "out of another dtype": ((Q, Q, Q), {"out": Q.half()}, TypeError, "out must have the dtype"),
    "out elsewhere": ((Q, Q, Q), {"out": Q.to("meta")}, ValueError, "out must be on the device"),
    "out in training": (
        (Q.clone().requires_grad_(), Q, Q),
        {"out": tensor(2, 5, 3, 4)},
        ValueError,
        "out is for inference",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case):
    arguments, options, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        attention(*arguments, **options)
