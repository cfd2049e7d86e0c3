"""The Triton kernels of the causal convolutions, interpreted on a few small calls, or on a GPU.

A step of the loop over taps takes the interpreter some milliseconds, and the gradient of the map
has steps for every edge: its calls are a few pixels large.
"""

import math

import pytest
import torch

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import causal_conv3d
from tests.kit import gpu
from tests.kit.inputs import with_layout
from tests.ops.causal_conv3d_cases import (
    DTYPES,
    ON_CPU,
    ROOM,
    Call,
    apply,
    assert_right,
    by_definition,
    draw_call,
    run,
    truth,
)

FORWARD = {
    "every edge": {"shape": (2, 19, 4, 5, 6)},
    "tiles": {"shape": (1, 33, 3, 9, 7), "channels": 70},
    "one row, past": {"shape": (1, 3, 2, 1, 7), "past": 2},
    "nothing before": {"shape": (1, 3, 4, 3, 2), "past": 0},
    "image": {"shape": (1, 16, 1, 6, 5)},
    "stride in space": {"shape": (1, 5, 3, 5, 6), "stride": (1, 2, 2)},
    "stride": {"shape": (1, 5, 5, 4, 7), "stride": (2, 2, 2)},
    "stride, past": {"shape": (1, 5, 4, 6, 1), "stride": (2, 2, 2), "past": 1},
    "pointwise": {"shape": (2, 40, 2, 5, 4), "kernel": 1},
    "pointwise, stride": {"shape": (1, 4, 4, 5, 4), "kernel": 1, "stride": (2, 2, 2)},
    "doubled": {"shape": (2, 5, 3, 3, 4), "factor": (2, 2, 2)},
    "doubled, past": {"shape": (1, 5, 2, 1, 4), "factor": (2, 2, 2), "past": 1},
    "doubled in space": {"shape": (1, 5, 3, 3, 1), "factor": (1, 2, 2)},
    "doubled in space, past": {"shape": (1, 5, 2, 2, 3), "factor": (1, 2, 2), "past": 2},
    "doubled in space, one before": {"shape": (1, 5, 2, 2, 3), "factor": (1, 2, 2), "past": 1},
    "doubled image": {"shape": (1, 5, 1, 3, 2), "factor": (2, 2, 2)},
}
BACKWARD = {
    "edges in space": {"shape": (1, 5, 1, 3, 3)},
    "edges in time": {"shape": (1, 5, 3, 1, 3), "kernel": (3, 1, 3)},
    "past": {"shape": (1, 19, 2, 3, 1), "kernel": (3, 3, 1), "past": 2, "channels": 18},
    "stride": {"shape": (2, 3, 3, 2, 4), "kernel": (3, 1, 3), "stride": (2, 2, 2)},
    "stride, past": {"shape": (1, 3, 4, 4, 2), "kernel": (3, 3, 1), "stride": (2, 2, 2), "past": 1},
    "pointwise": {"shape": (2, 20, 2, 2, 3), "kernel": 1, "channels": 35},
    "pointwise, stride": {"shape": (1, 3, 3, 3, 4), "kernel": 1, "stride": (2, 2, 2)},
    "doubled image": {"shape": (1, 5, 1, 2, 3), "factor": (1, 1, 2)},
    "doubled in time, past": {"shape": (1, 5, 2, 1, 1), "factor": (2, 1, 1), "past": 1},
}
WHOLE = {
    "plain": {"shape": (1, 19, 2, 3, 4), "channels": 21},
    "doubled": {"shape": (1, 4, 2, 2, 2), "factor": (2, 2, 2)},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
pytestmark = pytest.mark.skipif("triton_impl" not in implementations(ROOM), reason="needs Triton")
interpreted = pytest.mark.skipif("triton_impl" not in ON_CPU, reason="needs the interpreter")


def impl():
    return implementations(ROOM)["triton_impl"]


def assert_forward_right(call: Call) -> None:
    """With the gradients of the library, for they are judged together."""
    results = [impl().forward(*call.arguments), *run("library_impl", call)[1:]]
    assert_right(results, call)


@interpreted
@each_dtype
@pytest.mark.parametrize("case", FORWARD)
def test_forward(case, dtype, generator):
    assert_forward_right(draw_call(generator, dtype=dtype, **FORWARD[case]))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", BACKWARD)
def test_backward(case, dtype, generator):
    call = draw_call(generator, dtype=dtype, **BACKWARD[case])
    assert_right(run("triton_impl", call), call)


@interpreted
@pytest.mark.parametrize("case", WHOLE)
def test_both_on_every_edge_at_once(case, generator):
    call = draw_call(generator, dtype=torch.float16, **WHOLE[case])
    assert_right(run("triton_impl", call), call)


@interpreted
def test_sums_over_several_chunks(generator, monkeypatch):
    from hunyuan_fast.kernels.causal_conv3d import config

    monkeypatch.setattr(config, "_FEW_POSITIONS", 7)
    call = draw_call(generator, shape=(2, 3, 2, 3, 4), kernel=(1, 3, 3), dtype=torch.bfloat16)
    x, weight, _, stride, past, factor = call.arguments
    exact = truth(call)
    wants = (False, True, True, False)
    _, dweight, dbias, _ = impl().backward(call.dy, x, weight, stride, past, factor, wants)
    torch.testing.assert_close(dweight.double(), exact[2], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dbias.double(), exact[3], rtol=1e-2, atol=1e-2)


@interpreted
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset_by_one"])
def test_strides_do_not_matter(layout, generator):
    call = draw_call(generator, shape=(2, 5, 3, 1, 3), kernel=(3, 1, 3), past=2)
    awkward = call.map(lambda t: with_layout(t.contiguous(), layout) if t.dim() > 1 else t)
    for got, wanted in zip(run("triton_impl", awkward), run("triton_impl", call), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("past", [None, 2])
def test_activation_and_residual(past, generator):
    call = draw_call(generator, shape=(2, 6, 2, 3, 4), past=past, dtype=torch.bfloat16)
    scale, shift = (torch.randn(2, 6, generator=generator) for _ in range(2))
    residual = torch.randn(call.dy.shape, generator=generator).bfloat16()
    fused = {"scale": scale, "shift": shift, "residual": residual}
    results = []
    for name in ("triton_impl", "reference"):
        with use(name, ROOM), torch.no_grad():
            y = causal_conv3d(call.x, call.weight, call.bias, past=call.past, **fused)
        results.append(y)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("cases", [FORWARD, BACKWARD, WHOLE], ids=["forward", "backward", "whole"])
def test_on_a_gpu(cases, dtype, generator):
    smallest = min(cases.values(), key=lambda options: math.prod(options["shape"]))
    for options in gpu.size([*cases.values()], [smallest]):
        call = draw_call(generator, dtype=dtype, **options).map(torch.Tensor.cuda)
        results = run("triton_impl", call)
        assert_right(results, call)
        gpu.assert_same_bits_at_every_run(lambda call=call: run("triton_impl", call), gpu.FEW)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"shape": (1, 128, 5, 90, 160), "channels": 128},
        {"shape": (2, 256, 4, 33, 47), "channels": 256, "factor": (2, 2, 2)},
        {"shape": (1, 256, 5, 64, 64), "channels": 256, "stride": (2, 2, 2)},
        {"shape": (1, 512, 3, 32, 32), "channels": 512, "past": 2},
    ],
    ids=str,
)
def test_layers_on_a_gpu(options, generator):
    """Against the truth in float64 on the same GPU, of bf16."""
    options = options | gpu.size({}, {"shape": (1, 32, 2, 4, 4), "channels": 32})
    call = draw_call(generator, dtype=torch.bfloat16, **options).map(torch.Tensor.cuda)
    exact = by_definition(call.map(lambda t: t.double()))
    with use("triton_impl", ROOM), torch.no_grad():
        y = apply(call)
    error = (y.double() - exact).abs().max()
    assert error <= 2 * (exact.bfloat16().double() - exact).abs().max() + 2**-8
