"""Packed projections to joint heads as an op of torch: autograd, compilation, refusals."""

import os
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from hunyuan_fast.dispatch import explain, implementations, select, use
from hunyuan_fast.kernels.qk_norm_rope import reference
from hunyuan_fast.ops import qk_norm_rope
from tests.kit.numerics import assert_equal
from tests.ops.qk_norm_rope_cases import DTYPES, ROOM, answering_on_cpu, apply, draw_call, run

ON_CPU = answering_on_cpu(os.environ.get("TRITON_INTERPRET") == "1")
SMALL = {"batch": 1, "video": 2, "text": 1, "heads": 1, "head_dim": 8}

each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_number_of_streams = pytest.mark.parametrize("streams", [1, 2])


@pytest.mark.parametrize("needed", [(0,), (1,), (2, 5), (3,), (0, 3, 4), (1, 2, 4, 5)], ids=str)
@each_implementation
def test_gradients_of_some_inputs_only(name, needed, generator):
    call = draw_call(generator, **SMALL)
    whole = run(name, call)[3:]
    leaves = [t.requires_grad_(index in needed) for index, t in enumerate(call.leaves)]
    with use(name, ROOM):
        torch.autograd.backward(apply(call.with_leaves(leaves)), call.gradients)
    for index, leaf in enumerate(leaves):
        if index in needed:
            assert_equal(leaf.grad, whole[index])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
@each_implementation
def test_gradients_from_some_outputs_only(name, used, generator):
    call = draw_call(generator, **SMALL)
    zeros = [torch.zeros_like(t) for t in call.gradients]
    given = tuple(t if i in used else zeros[i] for i, t in enumerate(call.gradients))
    expected = run(name, replace(call, gradients=given))[3:]
    leaves = [t.requires_grad_() for t in call.leaves]
    with use(name, ROOM):
        outputs = apply(call.with_leaves(leaves))
        chosen = [outputs[index] for index in used]
        gradients = torch.autograd.grad(chosen, leaves, [given[index] for index in used])
    for got, wanted in zip(gradients, expected, strict=True):
        assert_equal(got, wanted)


@each_number_of_streams
def test_backward_keeps_the_inputs_and_nothing_else(streams, generator):
    call = draw_call(generator, streams=streams, head_dim=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(call.with_leaves([t.requires_grad_() for t in call.leaves]))
    inputs = {t.data_ptr() for t in (*call.leaves, *call.tables)}
    assert kept and {t.data_ptr() for t in kept} == inputs


def test_second_derivative_is_refused(generator):
    call = draw_call(generator, head_dim=8)
    leaves = [t.requires_grad_() for t in call.leaves]
    q, _, _ = apply(call.with_leaves(leaves))
    (dqkv,) = torch.autograd.grad(q.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="qk_norm_rope has no second derivative"):
        dqkv.sum().backward()


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype, enabled, generator):
    call = draw_call(generator, head_dim=16, dtype=dtype, weight_dtype=torch.float32)
    for name in [name for name in ON_CPU if name != "triton_impl"]:
        outside = run(name, call)
        with torch.autocast("cpu", enabled):
            inside = run(name, call)
        for got, wanted in zip(inside, outside, strict=True):
            assert_equal(got, wanted)


@each_number_of_streams
@each_implementation
def test_registration(name, streams, generator):
    call = draw_call(generator, streams=streams, dtype=torch.bfloat16, **SMALL)
    leaves = [t.clone().requires_grad_() for t in call.leaves]
    with use(name, ROOM):
        opcheck(torch.ops.hunyuan_fast.qk_norm_rope.default, call.with_leaves(leaves).arguments)
        backward = torch.ops.hunyuan_fast.qk_norm_rope_bwd.default
        opcheck(backward, (*call.gradients, *call.arguments))


@each_number_of_streams
def test_compiles_whole_and_once_for_three_lengths(streams, generator):
    counter = CompileCounter()
    compiled = torch.compile(apply, fullgraph=True, backend=counter)
    for video in (6, 10, 14):
        call = draw_call(generator, video=video, text=4, streams=streams, head_dim=8)
        torch._dynamo.mark_dynamic(call.qkv, 1)
        for table in call.tables:
            torch._dynamo.mark_dynamic(table, 0)
        for got, wanted in zip(compiled(call), apply(call), strict=True):
            assert_equal(got, wanted)
    assert counter.frame_count == 1


@each_number_of_streams
def test_compiled_gradients(streams, generator):
    call = draw_call(generator, streams=streams, head_dim=8, dtype=torch.bfloat16)
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in call.leaves]
    results = [
        torch.autograd.grad(function(call.with_leaves(leaves)), leaves, call.gradients)
        for function in (compiled, apply)
    ]
    for got, wanted in zip(*results, strict=True):
        assert_equal(got, wanted)


QKV, WEIGHT, TABLE = torch.zeros(2, 5, 3 * 2 * 4), torch.zeros(4), torch.zeros(3, 4)
TEXT = torch.zeros(2, 6, 24)
GOOD = {
    "qkv": QKV,
    "q_weight": WEIGHT,
    "k_weight": WEIGHT,
    "cos": TABLE,
    "sin": TABLE,
    "num_heads": 2,
}
ALL_VIDEO = {"cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4)}
TEXT_WEIGHTS = {"text_q_weight": WEIGHT, "text_k_weight": WEIGHT}
TWO = {**GOOD, **ALL_VIDEO, **TEXT_WEIGHTS, "text_qkv": TEXT}
LEARNED = TABLE.clone().requires_grad_()
META = torch.device("meta")
REFUSALS = {
    "qkv_not_a_tensor": (GOOD, {"qkv": [1.0]}, TypeError, "qkv must be a tensor, got list"),
    "qkv_integer": (GOOD, {"qkv": QKV.int()}, TypeError, "qkv must be float32.*got torch.int32"),
    "qkv_heads_apart": (GOOD, {"qkv": QKV[None]}, ValueError, r"qkv must be \(B, L, 3ND\)"),
    "heads_text": (GOOD, {"num_heads": "2"}, TypeError, "num_heads must be an integer, got str"),
    "no_heads": (GOOD, {"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "odd_heads": (GOOD, {"num_heads": 8}, ValueError, "with D even, a multiple of 48"),
    "no_width": (GOOD, {"qkv": QKV[..., :0]}, ValueError, r"a multiple of 12 .*\(2, 5, 0\)"),
    "weight_missing": (GOOD, {"k_weight": None}, TypeError, "k_weight must be a tensor"),
    "weight_long": (GOOD, {"q_weight": QKV[0, 0]}, ValueError, r"q_weight must be \(D,\) = \(4,\)"),
    "weight_integer": (GOOD, {"q_weight": WEIGHT.long()}, TypeError, "q_weight must be float32"),
    "weight_double": (GOOD, {"q_weight": WEIGHT.double()}, TypeError, "q_weight and qkv must both"),
    "qkv_double": (GOOD, {"qkv": QKV.double()}, TypeError, "must both be float64 or neither"),
    "weight_away": (GOOD, {"k_weight": WEIGHT.to(META)}, ValueError, "k_weight must be on the dev"),
    "cos_missing": (GOOD, {"cos": None}, TypeError, "cos must be a tensor, got NoneType"),
    "cos_rounded": (GOOD, {"cos": TABLE.half()}, TypeError, "cos must be float32, or float64"),
    "sin_double": (GOOD, {"sin": TABLE.double()}, TypeError, "sin must be float32, or float64"),
    "cos_flat": (GOOD, {"cos": WEIGHT}, ValueError, r"cos must be \(L_video, D\) with D = 4"),
    "cos_narrow": (GOOD, {"cos": TABLE[:, :2]}, ValueError, r"D = 4, got shape \(3, 2\)"),
    "cos_long": (GOOD, {"cos": torch.zeros(6, 4)}, ValueError, "at most L = 5 rows.*got 6"),
    "sin_short": (GOOD, {"sin": TABLE[:2]}, ValueError, r"sin must have the shape of cos, \(3, 4"),
    "sin_away": (GOOD, {"sin": TABLE.to(META)}, ValueError, "sin must be on the device of qkv"),
    "cos_learned": (GOOD, {"cos": LEARNED}, ValueError, "cos must not require a gradient"),
    "text_alone": (GOOD | ALL_VIDEO, {"text_qkv": TEXT}, TypeError, "text_q_weight.*got NoneType"),
    "weights_without_text": (GOOD, {"text_k_weight": WEIGHT}, ValueError, "go with text_qkv"),
    "text_among_video": (TWO, {"cos": TABLE, "sin": TABLE}, ValueError, "each of the L = 5 rows"),
    "text_flat": (TWO, {"text_qkv": TEXT[0]}, ValueError, r"text_qkv must be \(B, L, 3ND\)"),
    "text_rounded": (TWO, {"text_qkv": TEXT.half()}, TypeError, "text_qkv must have the dtype"),
    "text_of_one": (TWO, {"text_qkv": TEXT[:1]}, ValueError, r"B and 3ND of qkv, \(2, 5, 24\)"),
    "text_narrow": (TWO, {"text_qkv": TEXT[..., :12]}, ValueError, "B and 3ND of qkv"),
    "text_away": (TWO, {"text_qkv": TEXT.to(META)}, ValueError, "text_qkv must be on the device"),
    "text_weight_long": (TWO, {"text_k_weight": QKV[0, 0]}, ValueError, "text_k_weight must be"),
    "eps_zero": (GOOD, {"eps": 0.0}, ValueError, "eps must be positive.*got 0.0"),
    "eps_nan": (GOOD, {"eps": float("nan")}, ValueError, "eps must be positive"),
    "eps_text": (GOOD, {"eps": "1e-6"}, TypeError, "eps must be a number, got str"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    good, bad, error, words = REFUSALS[case]
    with pytest.raises(error, match=words):
        qk_norm_rope(**{**good, **bad})


def test_what_the_refusals_start_from_is_accepted():
    for good in (GOOD, TWO):
        assert all(t.shape[0] == 2 for t in qk_norm_rope(**good))


def test_who_answers_on_the_cpu():
    args = reference.example(torch.device("cpu"))
    reasons = explain(ROOM, *args)
    assert reasons["reference"] is None
    assert reasons["triton_impl"] is not None
    if "cpu_impl" in implementations(ROOM):
        assert select(ROOM, *args) is implementations(ROOM)["cpu_impl"]
