"""Frame-causal attention: every implementation against a mask, against each other, as an op."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.frame_causal_attention import library_impl, reference
from hunyuan_fast.ops import frame_causal_attention
from tests.kit import gpu
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_equal
from tests.ops.frame_causal_attention_cases import (
    HALF,
    ROOM,
    Call,
    answering,
    default,
    draw_call,
    emulation_of,
    judge,
    log_sum_exp,
    masked,
    run,
)

EVERYWHERE = answering(torch.bfloat16)
CASES = {
    "one frame": {"frames": 1, "tokens": 21, "head_dim": 32},
    "a token a frame": {"frames": 7, "tokens": 1, "head_dim": 16},
    "odd frames, two samples": {"frames": 3, "tokens": 7, "head_dim": 96, "batch": 2},
    "two heads, D of no tile": {"frames": 2, "tokens": 18, "head_dim": 20, "heads": 2},
    "frames above a tile": {"frames": 2, "tokens": 67, "head_dim": 16},
    "queries are the last frames": {"frames": 2, "tokens": 9, "head_dim": 16, "past": 3},
    "the head of the VAE": {"frames": 2, "tokens": 35, "head_dim": 512},
}

each_implementation = pytest.mark.parametrize("name", EVERYWHERE)
each_case = pytest.mark.parametrize("case", CASES)


@each_case
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for dtype in (torch.float32, *HALF) for name in answering(dtype)],
    ids=str,
)
def test_as_accurate_as_its_precision_allows(name, dtype, case, generator):
    call = draw_call(generator, dtype=dtype, **CASES[case])
    judge(name, run(name, call), call)


@each_case
@pytest.mark.parametrize("name", answering(torch.float64))
def test_formula_in_double_precision(name, case, generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 16)
    call = draw_call(generator, dtype=torch.float64, **CASES[case])
    for result, expected in zip(run(name, call), masked(call, torch.float64), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in answering(dtype)],
    ids=str,
)
@pytest.mark.parametrize("tokens", [7, 37])
def test_parts_of_every_frame_come_to_the_whole(name, dtype, tokens, generator):
    """Each asks whole frames; their shares of dk and dv add up."""
    call = draw_call(generator, tokens=tokens, past=1, heads=2, batch=2, dtype=dtype)
    out, dq, dk, dv = masked(call, torch.float64)
    found: list[list[Tensor]] = []
    bounds = (0, 3, 3, tokens)
    for first, after in itertools.pairwise(bounds):

        def part(x: Tensor, first=first, after=after) -> Tensor:
            return x.unflatten(1, (3, tokens))[:, :, first:after].flatten(1, 2)

        leaves = [x.detach().requires_grad_() for x in (part(call.q), call.k, call.v)]
        sizes = {"tokens_per_frame": tokens, "query_tokens_per_frame": after - first}
        with use(name if after > first else "reference", ROOM):
            own = frame_causal_attention(*leaves, **sizes, scale=call.scale)
            gradients = torch.autograd.grad(own, leaves, part(call.dout))
        assert own.shape == leaves[0].shape
        found.append([own.detach(), *gradients])
        for result, wanted in ((own, part(out)), (gradients[0], part(dq))):
            assert_near(result, wanted)
    for i, wanted in ((2, dk), (3, dv)):
        assert_near(sum(each[i].double() for each in found), wanted, dtype)


def assert_near(result: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """Within what a few roundings cost: all rows together, and the worst one."""
    limit = 1e-5 if (dtype or result.dtype) == torch.float32 else 2**-7
    error = (result.double() - wanted).square().mean((-2, -1)).sqrt()
    scale = wanted.square().mean().sqrt() if wanted.numel() else wanted.new_ones(())
    assert not error.numel() or error.square().mean().sqrt() < limit * scale
    assert not error.numel() or error.max() < 4 * limit * scale


@pytest.mark.parametrize("past", [0, 1])
@pytest.mark.parametrize("name", answering(torch.float64))
def test_gradcheck(name, past, generator):
    call = draw_call(
        generator, frames=2, tokens=2, past=past, heads=2, head_dim=3, dtype=torch.float64
    )
    leaves = [x.requires_grad_() for x in call.tensors]
    with use(name, ROOM):
        assert torch.autograd.gradcheck(
            lambda *x: frame_causal_attention(*x, tokens_per_frame=2, scale=0.7), leaves
        )


@pytest.mark.parametrize("sharpness", [8.0, 0.01])
@each_implementation
def test_sharp_and_flat_scores(name, sharpness, generator):
    call = draw_call(generator, tokens=19, head_dim=64, dtype=torch.bfloat16)
    call = replace(call, q=call.q * sharpness)
    judge(name, run(name, call), call)


@each_implementation
def test_large_scores_do_not_overflow(name, generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    call = replace(call, q=call.q * 1e3, k=call.k * 1e3)
    assert all(x.isfinite().all() for x in run(name, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_implementations_agree_and_can_be_mixed(dtype, generator):
    """Forward by one, backward by another: outputs and log-sum-exp mean the same to all."""
    call = draw_call(generator, tokens=11, past=1, heads=2, batch=2, head_dim=32, dtype=dtype)
    exact = log_sum_exp(call)
    modules = implementations(ROOM)
    for first, second in itertools.product(answering(dtype), repeat=2):
        out, lse = modules[first].forward(*call.arguments)
        assert lse.dtype == torch.float32
        # An error e scales a row of probabilities by 1 + e: far below a digit of bf16.
        assert (lse - exact).abs().max() < 2**-12
        gradients = modules[second].backward(call.dout, out, lse, *call.arguments)
        makers = [emulation_of(each, call)(call) for each in (first, second)]
        golden = [makers[0][0], *makers[1][1:]]
        judge(f"{first}, {second}", [out, *gradients], call, lambda _, golden=golden: golden)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@each_implementation
def test_later_frames_do_not_reach_earlier_ones(name, tokens, bad, generator):
    call = draw_call(generator, frames=3, tokens=tokens, past=1, dtype=torch.bfloat16)
    expected = run(name, call)
    spoiled = call.map(torch.clone)
    for x in (spoiled.q, spoiled.dout):
        x[:, 2 * tokens :] = bad
    for x in (spoiled.k, spoiled.v):
        x[:, 3 * tokens :] = bad
    out, dq, dk, dv = run(name, spoiled)
    for got, wanted in zip((out, dq), expected[:2], strict=True):
        assert_equal(got[:, : 2 * tokens], wanted[:, : 2 * tokens])
        assert got[:, 2 * tokens :].isnan().any()
    assert dk.isnan().any() and dv.isnan().any()


@each_implementation
def test_earlier_frames_reach_later_ones(name, generator):
    call = draw_call(generator, frames=3, tokens=5, dtype=torch.bfloat16)
    out = run(name, call)[0]
    changed = call.v.clone()
    changed[:, 3] += 8
    other = run(name, replace(call, v=changed))[0]
    assert (out != other).any(-1).all()


@each_implementation
def test_frames_one_by_one_are_the_clip(name, generator):
    """The queries of each frame beside the keys so far, as a decoder in chunks asks."""
    call = draw_call(generator, frames=3, tokens=6, head_dim=32, dtype=torch.bfloat16)
    options = {"tokens_per_frame": 6, "scale": call.scale}
    with use(name, ROOM):
        whole = frame_causal_attention(*call.tensors, **options)
        for end in (6, 12, 18):
            q, k, v = call.q[:, end - 6 : end], call.k[:, :end], call.v[:, :end]
            assert_equal(frame_causal_attention(q, k, v, **options), whole[:, end - 6 : end])


@pytest.mark.parametrize("layout", LAYOUTS)
@each_implementation
def test_strides_do_not_matter(name, layout, generator):
    call = draw_call(generator, batch=2, past=1, heads=2, dtype=torch.bfloat16)
    strided = call.map(lambda x: with_layout(x, layout))
    results = run(name, strided)
    expected = run(name, strided.map(torch.Tensor.contiguous))
    for result, wanted in zip(results, expected, strict=True):
        # Not bit for bit: matrix products sum in an order that depends on the alignment.
        torch.testing.assert_close(result, wanted, rtol=2**-7, atol=2**-9)


def test_features_that_are_not_adjacent_go_to_those_who_take_them(generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    across = call.map(lambda x: x.transpose(1, 3).contiguous().transpose(1, 3))
    reasons = explain(ROOM, *across.arguments)
    assert "adjacent" in reasons["library_impl"]
    for name in set(EVERYWHERE) - {"library_impl"}:
        for result, wanted in zip(run(name, across), run(name, call), strict=True):
            assert_equal(result, wanted)


@pytest.mark.parametrize("stride", [(2**31 + 8, 16, 16, 1), (16, 2**31 + 8, 16, 1)], ids=str)
@each_implementation
def test_rows_and_samples_past_two_to_the_31(name, stride, generator):
    shorter = {"frames": 1, "tokens": 2} if stride[1] > stride[0] else {"frames": 1, "tokens": 1}
    call = draw_call(generator, batch=2, past=1, dtype=torch.bfloat16, **shorter)
    far = call.map(lambda x: far_apart(x.shape, stride).copy_(x))
    for result, wanted in zip(run(name, far), run(name, call), strict=True):
        torch.testing.assert_close(result, wanted, rtol=2**-7, atol=2**-9)


@each_implementation
def test_the_same_bits_at_every_run(name, generator):
    call = draw_call(generator, tokens=9, heads=2, dtype=torch.bfloat16)
    first = run(name, call)
    for got, wanted in zip(run(name, call), first, strict=True):
        assert_equal(got, wanted)


@pytest.mark.parametrize("shape", [(0, 6, 2, 8), (2, 0, 2, 8), (2, 6, 0, 8)], ids=str)
def test_empty_tensors(shape):
    q = torch.empty(shape, requires_grad=True)
    out = frame_causal_attention(q, q, q, tokens_per_frame=3)
    assert out.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values of the largest tensor any operation returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


def test_no_mask_and_no_table_of_scores(generator):
    """With 1088 tokens a mask would have 1183744 values; nothing is larger than the inputs."""
    call = draw_call(generator, frames=17, tokens=64, head_dim=16)
    with LargestTensor() as largest:
        out, lse = library_impl.forward(*call.arguments)
        library_impl.backward(call.dout, out, lse, *call.arguments)
    assert largest.values == call.q.numel()


def test_backward_keeps_inputs_output_and_one_number_a_row(generator):
    call = draw_call(generator, past=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        leaves = [x.requires_grad_() for x in call.tensors]
        out = frame_causal_attention(*leaves, tokens_per_frame=call.tokens)
    inputs = {x.data_ptr() for x in (*leaves, out)}
    (lse,) = [t for t in kept if t.data_ptr() not in inputs]
    assert lse.shape == (1, 1, call.q.shape[1]) and len(kept) == 5


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_inputs_need_no_gradient(needed, generator):
    call = draw_call(generator)
    expected = run(default(call), call)[1:]
    leaves = [x.requires_grad_(i in needed) for i, x in enumerate(call.tensors)]
    out = frame_causal_attention(*leaves, tokens_per_frame=call.tokens)
    gradients = torch.autograd.grad(out, [leaves[i] for i in needed], call.dout)
    for i, gradient in zip(needed, gradients, strict=True):
        assert_equal(gradient, expected[i])


def test_second_derivative_is_refused(generator):
    call = draw_call(generator)
    q = call.q.requires_grad_()
    out = frame_causal_attention(q, call.k, call.v, tokens_per_frame=call.tokens)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="frame_causal_attention has no second derivative"):
        dq.sum().backward()


def test_query_tokens_are_checked():
    q = torch.zeros(1, 6, 1, 4)
    for own, error, words in (
        (4, ValueError, "q must hold whole frames of query_tokens_per_frame = 4, got 6"),
        (0, ValueError, "query_tokens_per_frame = 0, got 6"),
        (1, ValueError, "at least as many frames as q, 6, got 2"),
        (2.0, TypeError, "query_tokens_per_frame must be an int, got 2.0"),
    ):
        with pytest.raises(error, match=words):
            frame_causal_attention(q, q, q, tokens_per_frame=3, query_tokens_per_frame=own)


@each_implementation
def test_registration(name, generator):
    call = draw_call(generator, frames=2, past=1, dtype=torch.bfloat16)
    ops = torch.ops.hunyuan_fast
    with use(name, ROOM):
        out, lse = ops.frame_causal_attention(*call.arguments)
        opcheck(ops.frame_causal_attention_bwd.default, (call.dout, out, lse, *call.arguments))
        leaves = [x.requires_grad_() for x in call.tensors]
        opcheck(ops.frame_causal_attention.default, (*leaves, *call.arguments[3:]))


def test_compiles_whole_and_once_for_three_sizes(generator):
    counter = CompileCounter()

    def attend(q: Tensor, k: Tensor, v: Tensor, grid: Tensor) -> Tensor:
        return frame_causal_attention(q, k, v, tokens_per_frame=grid.shape[0])

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for tokens in (4, 6, 10):
        call = draw_call(generator, frames=3, tokens=tokens)
        grid = torch.empty(tokens)
        for x in (*call.tensors, grid):
            torch._dynamo.mark_dynamic(x, 1 if x.dim() == 4 else 0)
        assert_equal(compiled(*call.tensors, grid), attend(*call.tensors, grid))
    assert counter.frame_count == 1


def test_compiled_gradients(generator):
    call = draw_call(generator, past=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return frame_causal_attention(q, k, v, tokens_per_frame=call.tokens)

    leaves = [x.requires_grad_() for x in call.tensors]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    gradients = torch.autograd.grad(compiled, leaves, call.dout)
    for got, wanted in zip(gradients, run(default(call), call)[1:], strict=True):
        assert_equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_who_answers_on_the_cpu(dtype, generator):
    call = draw_call(generator, dtype=dtype)
    native = implementations(ROOM).get("cpu_impl")
    left_to_torch = native is None or dtype == torch.float64 or native.prefers("cpu", call.q)
    assert default(call) == ("library_impl" if left_to_torch else "cpu_impl")
    assert explain(ROOM, *call.arguments)["library_impl"] is None
    assert explain(ROOM, *reference.example(torch.device("cpu")))["reference"] is None


def refusals() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], int, type, str]]:
    q = torch.zeros(2, 6, 3, 4)
    return {
        "q of three dimensions": ((q[0], q, q), 3, ValueError, r"q must be \(B, L, N, D\)"),
        "v of three dimensions": ((q, q, q[0]), 3, ValueError, r"v must be \(B, L, N, D\)"),
        "fewer keys": ((q, q[:, :3], q[:, :3]), 3, ValueError, "at least as many frames as q, 2"),
        "k of another batch": ((q, q[:1], q[:1]), 3, ValueError, "batch, heads and head dimension"),
        "v of another length": ((q, q, q[:, :3]), 3, ValueError, "v must have the shape of k"),
        "k of another dtype": ((q, q.half(), q), 3, TypeError, "k must have the dtype of q"),
        "v elsewhere": ((q, q, q.to("meta")), 3, ValueError, "v must be on the device of q, cpu"),
        "integers": ((q.int(),) * 3, 3, TypeError, "floating-point"),
        "no features": ((q[..., :0],) * 3, 3, ValueError, "at least 1"),
        "half a frame": ((q, q, q), 4, ValueError, "q must hold whole .* = 4, got 6"),
        "no tokens": ((q, q, q), 0, ValueError, "tokens_per_frame = 0"),
        "fewer than none": ((q, q, q), -3, ValueError, "tokens_per_frame = -3"),
        "half a frame of keys": (
            (q[:, :3], q[:, :4], q[:, :4]),
            3,
            ValueError,
            "k must hold whole frames .* = 3, got 4",
        ),
        "a fraction": ((q, q, q), 3.0, TypeError, "must be an int, got 3.0"),
    }


@pytest.mark.parametrize("case", refusals())
def test_bad_arguments_are_refused(case):
    tensors, tokens, error, message = refusals()[case]
    with pytest.raises(error, match=message):
        frame_causal_attention(*tensors, tokens_per_frame=tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 256, 512])
@pytest.mark.parametrize("tokens", gpu.size([1, 37, 130], [1, 9]))
@pytest.mark.parametrize("name", implementations(ROOM))  # also those that take nothing on a CPU
def test_on_a_gpu(name, tokens, head_dim, dtype, generator):
    sizes = {"frames": 3, "past": 1, "batch": 2, "heads": 2, "head_dim": head_dim}
    call: Call = draw_call(generator, tokens=tokens, dtype=dtype, **sizes).map(torch.Tensor.cuda)
    if reason := implementations(ROOM)[name].supports(*call.arguments):
        pytest.skip(reason)
    first = run(name, call)
    judge(name, first, call)
    gpu.assert_same_bits_at_every_run(lambda: run(name, call), gpu.FEW)
