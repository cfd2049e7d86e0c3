"""The causal convolutions as ops of torch: autograd, autocast, compilation, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from hunyuan_fast.dispatch import use
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d
from tests.kit.numerics import assert_equal
from tests.ops.causal_conv3d_cases import QUICK, ROOM, Call, apply, differentiate, draw_call, run

CALLS = {
    "plain": {},
    "past": {"past": 2, "stride": (2, 2, 2)},
    "upsampled": {"factor": (2, 2, 2)},
    "upsampled past": {"factor": (1, 2, 2), "past": 2, "bias": False},
    "image": {"shape": (1, 3, 1, 3, 4)},
}
each_call = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
each_implementation = pytest.mark.parametrize("name", QUICK)


def small(generator: torch.Generator, options: dict) -> Call:
    return draw_call(generator, **{"shape": (1, 2, 2, 3, 4), "channels": 3, **options})


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("factor", [None, (2, 2, 2)], ids=str)
@each_implementation
def test_gradients_of_some_inputs_only(name, factor, needed, generator):
    call = small(generator, {"factor": factor, "past": 1 if factor else 2})
    whole = run(name, call)[1:]
    leaves = [t.requires_grad_(index in needed) for index, t in enumerate(call.leaves)]
    with use(name, ROOM):
        apply(call).backward(call.dy)
    for index, leaf in enumerate(leaves):
        if index in needed:
            assert_equal(leaf.grad, whole[index])
        else:
            assert leaf.grad is None


@each_call
def test_backward_keeps_the_inputs_and_nothing_else(options, generator):
    call = small(generator, options)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(call.map(lambda t: t.requires_grad_()))
    expected = {t.data_ptr() for t in (call.x, call.weight, call.past) if t is not None}
    assert {t.data_ptr() for t in kept} == expected


def test_second_derivative_is_refused(generator):
    call = small(generator, {})
    x = call.x.requires_grad_()
    (dx,) = torch.autograd.grad(apply(call).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv3d has no second derivative"):
        dx.sum().backward()


@each_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_casts_as_torch_does(dtype, options, generator):
    """Gradients return to the dtype of the leaves."""
    call = small(generator, options)
    with torch.autocast("cpu", dtype):
        cast = differentiate(apply, call.map(lambda t: t.to(dtype) if t is call.dy else t))
    expected = differentiate(apply, call.map(lambda t: t.to(dtype)))
    assert cast[0].dtype == dtype
    for got, wanted in zip(cast, expected, strict=True):
        if got is not None:
            assert_equal(got, wanted.to(got.dtype))
    double = call.map(torch.Tensor.double)
    with torch.autocast("cpu", dtype):
        assert apply(double).dtype == torch.float64


@each_call
@each_implementation
def test_registration(name, options, generator):
    call = small(generator, options)
    ops = torch.ops.hunyuan_fast
    steps = call.factor or call.stride
    leaves = [None if t is None else t.clone().requires_grad_() for t in call.leaves]
    wants = [True, True, call.bias is not None, call.past is not None]
    with use(name, ROOM):
        if call.factor is None:
            opcheck(ops.causal_conv3d.default, (*leaves, *steps, None, None, None))
        else:
            opcheck(ops.upsample_causal_conv3d.default, (*leaves, *steps))
        rest = (*steps, call.factor is not None, *wants)
        opcheck(ops.causal_conv3d_bwd.default, (call.dy, call.x, call.weight, call.past, *rest))


@each_implementation
def test_registration_of_what_is_fused(name, generator):
    call = small(generator, {"past": 1})
    scale, shift = torch.randn(2, 1, 2, generator=generator)
    fused = (1, 1, 1, scale, shift, call.dy)
    with use(name, ROOM):
        opcheck(torch.ops.hunyuan_fast.causal_conv3d.default, (*call.leaves, *fused))


@each_call
def test_compiles_whole(options, generator):
    counter = CompileCounter()
    compiled = torch.compile(apply, fullgraph=True, backend=counter)
    call = small(generator, options)
    assert_equal(compiled(call), apply(call))
    assert counter.frame_count == 1
    torch.compiler.reset()
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(differentiate(compiled, call), differentiate(apply, call), strict=True):
        if wanted is not None:
            assert_equal(got, wanted)


def test_compiles_once_for_three_sizes(generator):
    counter = CompileCounter()

    def function(x, weight):
        return upsample_causal_conv3d(causal_conv3d(x, weight), weight, factor=(2, 2, 2))

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    weight = torch.randn(3, 3, 3, 3, 3, generator=generator)
    for n in (3, 5, 8):
        x = torch.randn(2, 3, n, n + 1, n + 2, generator=generator)
        for dim in (2, 3, 4):
            torch._dynamo.mark_dynamic(x, dim)
        assert_equal(compiled(x, weight), function(x, weight))
    assert counter.frame_count == 1


def test_tensors_without_memory():
    x, weight = torch.empty(2, 3, 4, 5, 6, device="meta"), torch.empty(7, 3, 3, 3, 3, device="meta")
    y = causal_conv3d(x, weight, stride=(2, 2, 2), past=x[:, :, :1])
    assert y.shape == (2, 7, 2, 3, 3)
    assert upsample_causal_conv3d(x, weight, factor=(2, 2, 1)).shape == (2, 7, 7, 10, 6)


X, W, B = torch.zeros(2, 3, 4, 5, 6), torch.zeros(7, 3, 3, 3, 3), torch.zeros(7)
VECTOR = torch.zeros(2, 3)
REFUSALS = {
    "x no tensor": (([], W), {}, TypeError, "x must be a tensor, got list"),
    "x of integers": ((X.int(), W), {}, TypeError, "x must be float32, .* got torch.int32"),
    "x of four dimensions": ((X[0], W), {}, ValueError, r"x must be \(B, C, T, H, W\)"),
    "no frames": ((X[:, :, :0], W), {}, ValueError, "x must have channels, frames"),
    "weight no tensor": ((X, None), {}, TypeError, "weight must be a tensor"),
    "weight of another dtype": ((X, W.half()), {}, TypeError, "weight must have the dtype of x"),
    "weight elsewhere": ((X, W.to("meta")), {}, ValueError, "weight must be on the device of x"),
    "weight of other channels": ((X, W[:, :2]), {}, ValueError, "with C = 3, as in x"),
    "even taps": ((X, W[..., :2]), {}, ValueError, "weight must have odd KH and KW"),
    "bias of another size": ((X, W, B[:3]), {}, ValueError, r"bias must be \(O,\) = \(7,\)"),
    "bias of another dtype": ((X, W, B.double()), {}, TypeError, "bias must have the dtype of x"),
    "stride a number": ((X, W), {"stride": 2}, TypeError, "stride must be a tuple"),
    "stride of floats": ((X, W), {"stride": (1.0, 1, 1)}, TypeError, "three integers"),
    "stride of two": ((X, W), {"stride": (1, 1)}, ValueError, "stride must be three integers"),
    "stride zero": ((X, W), {"stride": (0, 1, 1)}, ValueError, "each at least 1"),
    "past no tensor": ((X, W), {"past": 2}, TypeError, "past must be a tensor"),
    "past of another size": ((X, W), {"past": X[..., :2]}, ValueError, "but for the frames"),
    "past of another dtype": ((X, W), {"past": X.half()}, TypeError, "past must have the dtype"),
    "too few frames": (
        (X[:, :, :1], W),
        {"past": X[:, :, :1]},
        ValueError,
        "past and x must have at least KT = 3 frames together, got 1 and 1",
    ),
    "scale alone": ((X, W), {"scale": VECTOR}, ValueError, "scale and shift go together"),
    "scale of 16 bits": (
        (X.half(), W.half()),
        {"scale": VECTOR.half(), "shift": VECTOR},
        TypeError,
        "scale must be torch.float32 beside x in torch.float16",
    ),
    "shift of another size": (
        (X, W),
        {"scale": VECTOR, "shift": VECTOR[:1]},
        ValueError,
        r"shift must be \(B, C\) = \(2, 3\)",
    ),
    "scale elsewhere": (
        (X, W),
        {"scale": VECTOR.to("meta"), "shift": VECTOR},
        ValueError,
        "scale must be on the device of x",
    ),
    "residual of another size": ((X, W), {"residual": X}, ValueError, "the shape of the result"),
    "residual in training": (
        (X, W.clone().requires_grad_()),
        {"residual": torch.zeros(2, 7, 4, 5, 6)},
        ValueError,
        "are for inference",
    ),
}
UPSAMPLING_REFUSALS = {
    "factor three": ((X, W), {"factor": (1, 3, 1)}, ValueError, "factor must hold 1 and 2 only"),
    "factor a list of one": ((X, W), {"factor": [2]}, ValueError, "factor must be three integers"),
    "factor missing": ((X, W), {"factor": None}, TypeError, "factor must be a tuple"),
    "one tap": ((X, W[..., :1]), {"factor": (2, 2, 2)}, ValueError, r"\(O, C, 3, 3, 3\)"),
    "past of none": ((X, W), {"factor": (1, 2, 2), "past": X[:, :, :0]}, ValueError, "1 or 2"),
    "past of two": ((X, W), {"factor": (2, 2, 2), "past": X[:, :, :2]}, ValueError, "1 frame for"),
    "past of three": ((X, W), {"factor": (1, 2, 2), "past": X[:, :, :3]}, ValueError, "got 3"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case):
    arguments, options, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        causal_conv3d(*arguments, **options)


@pytest.mark.parametrize("case", UPSAMPLING_REFUSALS)
def test_bad_arguments_of_upsampling_are_refused(case):
    arguments, options, error, message = UPSAMPLING_REFUSALS[case]
    with pytest.raises(error, match=message):
        upsample_causal_conv3d(*arguments, **options)


def test_fused_arguments_need_no_gradients_under_no_grad(generator):
    call = small(generator, {})
    trained = replace(call, weight=call.weight.requires_grad_())
    with torch.no_grad():
        y = causal_conv3d(trained.x, trained.weight, residual=call.dy)
    assert not y.requires_grad
