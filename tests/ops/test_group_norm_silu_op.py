"""Group norm with SiLU as an op of torch: autograd, compilation, refusals."""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from hunyuan_fast.dispatch import explain, implementations, select, use
from hunyuan_fast.kernels.group_norm_silu import reference
from hunyuan_fast.ops import group_norm_silu, group_norm_stats, merge_group_norm_stats
from tests.kit.numerics import assert_equal
from tests.ops.group_norm_silu_cases import (
    DTYPES,
    ROOM,
    answering_on_cpu,
    apply,
    draw_call,
    run,
)

ON_CPU = answering_on_cpu(os.environ.get("TRITON_INTERPRET") == "1")
SMALL = (2, 4, 1, 2, 3)

each_implementation = pytest.mark.parametrize("name", ON_CPU)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@each_implementation
def test_gradients_of_some_inputs_only(name, needed, generator):
    call = draw_call(generator, SMALL, 2)
    whole = run(name, call)[1:]
    leaves = [t.requires_grad_(index in needed) for index, t in enumerate(call.leaves)]
    with use(name, ROOM):
        torch.autograd.backward(apply(call.with_leaves(leaves)), call.dy)
    for index, leaf in enumerate(leaves):
        if index in needed:
            assert_equal(leaf.grad, whole[index])
        else:
            assert leaf.grad is None


def test_backward_keeps_x_and_no_copy_of_it(generator):
    call = draw_call(generator)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(call.with_leaves([t.requires_grad_() for t in call.leaves]))
    of_maps = [t for t in kept if t.numel() >= call.x.numel()]
    assert [t.data_ptr() for t in of_maps] == [call.x.data_ptr()]


def test_second_derivative_is_refused(generator):
    call = draw_call(generator, SMALL, 2)
    leaves = [t.requires_grad_() for t in call.leaves]
    (dx,) = torch.autograd.grad(apply(call.with_leaves(leaves)).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype, enabled, generator):
    call = draw_call(generator, dtype=dtype, weight_dtype=torch.float32)
    for name in [name for name in ON_CPU if name != "triton_impl"]:
        outside = run(name, call)
        with torch.autocast("cpu", enabled):
            inside = run(name, call)
        for got, wanted in zip(inside, outside, strict=True):
            assert_equal(got, wanted)


@pytest.mark.parametrize("silu", [True, False])
@each_implementation
def test_registration(name, silu, generator):
    call = draw_call(generator, SMALL, 2, silu=silu, dtype=torch.bfloat16)
    x, weight, bias = (t.clone().requires_grad_() for t in call.leaves)
    operators = torch.ops.hunyuan_fast
    with use(name, ROOM):
        stats = group_norm_stats(call.x, 2)
        rest = (weight, bias, call.eps, silu)
        opcheck(operators.group_norm_silu.default, (x, 2, *rest, None))
        with torch.no_grad():
            opcheck(operators.group_norm_silu.default, (*call.arguments[:-1], stats))
        opcheck(operators.group_norm_stats.default, (call.x, 2))
        given = (call.dy, call.x, call.weight, call.bias, stats, call.eps, silu)
        opcheck(operators.group_norm_silu_bwd.default, given)


def test_compiles_whole_and_once_for_three_sizes(generator):
    counter = CompileCounter()
    compiled = torch.compile(apply, fullgraph=True, backend=counter)
    for size in (4, 6, 10):
        call = draw_call(generator, (2, 8, size + 1, size, size + 2), 4)
        for dim in (2, 3, 4):
            torch._dynamo.mark_dynamic(call.x, dim)
        assert_equal(compiled(call), apply(call))
    assert counter.frame_count == 1


def test_compiled_gradients(generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in call.leaves]
    results = [
        torch.autograd.grad(function(call.with_leaves(leaves)), leaves, call.dy)
        for function in (compiled, apply)
    ]
    for got, wanted in zip(*results, strict=True):
        assert_equal(got, wanted)


def test_compiled_chunks(generator):
    call = draw_call(generator, (1, 8, 4, 3, 3), 4)

    def in_chunks(x):
        parts = x.split(2, dim=2)
        stats = merge_group_norm_stats([group_norm_stats(part, 4) for part in parts])
        return [group_norm_silu(p, 4, call.weight, call.bias, stats=stats) for p in parts]

    compiled = torch.compile(in_chunks, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, wanted in zip(compiled(call.x), in_chunks(call.x), strict=True):
            assert_equal(got, wanted)


def test_statistics_have_no_gradient(generator):
    call = draw_call(generator)
    assert not group_norm_stats(call.x.requires_grad_(), 4).requires_grad


X, WEIGHT = torch.zeros(2, 8, 3, 4, 5), torch.zeros(8)
STATS = torch.ones(3, 2, 4, dtype=torch.float64)
GOOD = {"x": X, "num_groups": 4, "weight": WEIGHT, "bias": WEIGHT}
META = torch.device("meta")
REFUSALS = {
    "x_not_a_tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x_integer": ({"x": X.int()}, TypeError, "x must be float32.*got torch.int32"),
    "x_flat": ({"x": X[0]}, ValueError, r"x must be \(B, C, T, H, W\), got shape \(8, 3, 4, 5\)"),
    "groups_text": ({"num_groups": "4"}, TypeError, "num_groups must be an integer, got str"),
    "groups_bool": ({"num_groups": True}, TypeError, "num_groups must be an integer, got bool"),
    "groups_none": ({"num_groups": 0}, ValueError, "num_groups must divide.*C = 8, got 0"),
    "groups_three": ({"num_groups": 3}, ValueError, "num_groups must divide.*C = 8, got 3"),
    "no_channels": ({"x": X[:, :0]}, ValueError, "num_groups must divide.*C = 0"),
    "weight_missing": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "weight_short": ({"weight": WEIGHT[:7]}, ValueError, r"weight must be \(C,\) = \(8,\)"),
    "bias_integer": ({"bias": WEIGHT.long()}, TypeError, "bias must be float32.*torch.int64"),
    "bias_double": ({"bias": WEIGHT.double()}, TypeError, "bias and x must both be float64"),
    "weight_away": ({"weight": WEIGHT.to(META)}, ValueError, "weight must be on the device of x"),
    "eps_zero": ({"eps": 0.0}, ValueError, "eps must be positive.*got 0.0"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps must be positive"),
    "eps_text": ({"eps": "1e-6"}, TypeError, "eps must be a number, got str"),
    "stats_text": ({"stats": "own"}, TypeError, "stats must be a tensor, got str"),
    "stats_single": ({"stats": STATS.float()}, TypeError, "stats must be float64"),
    "stats_flat": ({"stats": STATS[0]}, ValueError, r"stats must be \(3, B, G\)"),
    "stats_of_one": ({"stats": STATS[:, :1]}, ValueError, r"\(3, 2, 4\), got shape \(3, 1, 4\)"),
    "stats_away": ({"stats": STATS.to(META)}, ValueError, "stats must be on the device of x"),
    "stats_trained": (
        *({"stats": STATS, "weight": WEIGHT.clone().requires_grad_()}, ValueError),
        "stats are for inference",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    bad, error, words = REFUSALS[case]
    with pytest.raises(error, match=words):
        group_norm_silu(**{**GOOD, **bad})


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ([], ValueError, "at least one"),
        ([STATS, STATS[:, :1]], ValueError, r"one shape, got \(3, 2, 4\) and \(3, 1, 4\)"),
        ([STATS, STATS.float()], TypeError, r"parts\[1\] must be float64"),
        ([STATS, 1.0], TypeError, r"parts\[1\] must be a tensor, got float"),
    ],
)
def test_what_cannot_be_merged(parts, error, words):
    with pytest.raises(error, match=words):
        merge_group_norm_stats(parts)


def test_what_the_refusals_start_from_is_accepted():
    for stats in (None, STATS):
        assert group_norm_silu(**GOOD, stats=stats).shape == X.shape


def test_who_answers_on_the_cpu():
    args = reference.example(torch.device("cpu"))
    reasons = explain(ROOM, *args)
    assert reasons["reference"] is None
    assert reasons["triton_impl"] is not None
    if "cpu_impl" in implementations(ROOM):
        assert select(ROOM, *args) is implementations(ROOM)["cpu_impl"]
