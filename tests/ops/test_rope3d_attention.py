"""Attention over valid prefixes: every implementation against the truth and against each other."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.rope3d_attention import library_impl, reference
from hunyuan_fast.ops.rope3d_attention import attention
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import Fenced
from tests.kit.numerics import assert_as_good_as, assert_equal

ROOM = "rope3d_attention"
IMPLEMENTATIONS = tuple(implementations(ROOM))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_VIDEO, NUM_TEXT = 33, 16
# Batches of 1 to 5 samples, neighbours alike or not; each entry is the number of valid text tokens.
TEXT_LENGTHS = [(0,), (16,), (9, 9), (0, 16), (1, 7), (0, 1, 16), (16, 16, 16), (5, 5, 0, 0, 1)]

each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def draw_inputs(
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def run(name: str, inputs: list[Tensor], lengths: list[int] | None, scale: float) -> list[Tensor]:
    """out, lse, dq, dk, dv of one implementation."""
    q, k, v, dout = inputs
    kv_len = None if lengths is None else torch.tensor(lengths, device=q.device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with use(name, ROOM):
        out, lse = attention(*leaves, kv_len=kv_len, scale=scale, return_lse=True)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout)]


def plain(inputs: list[Tensor], lengths: list[int], scale: float, dtype: torch.dtype):
    """The same by plain torch in ``dtype``; float64 is the truth."""
    q, k, v, dout = (x.detach().cpu().to(dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = plain_attention(*leaves, lengths, scale)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def emulated(name: str, inputs: list[Tensor], lengths: list[int], scale: float):
    """The same with the roundings of a flash kernel, and of torch's CPU kernel in particular."""
    q, k, v, dout = (x.cpu() for x in inputs)
    # torch's CPU kernel keeps dk and dv in the dtype of the inputs between blocks of queries.
    block = 64 if max(lengths) >= 192 else 32
    kernel = FlashAttention(gradient_block=block if name == "library_impl" else None)
    out, lse = kernel.forward(q, k, v, lengths, scale)
    return [out, lse, *kernel.backward(dout, out, lse, q, k, v, lengths, scale)]


def judge(
    name: str, results: list[Tensor], inputs: list[Tensor], lengths: list[int], scale: float
) -> None:
    dtype = inputs[0].dtype
    exact = plain(inputs, lengths, scale, torch.float64)
    same_dtype = plain(inputs, lengths, scale, dtype)
    golden = emulated(name, inputs, lengths, scale)
    # With fp32 inputs only the order of summation is left to compare, and it is anyone's.
    rms_factor = 2.0 if dtype == torch.float32 else 1.15
    for i, label in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        assert results[i].dtype == dtype
        assert_as_good_as(
            results[i].cpu(),
            exact[i],
            same_dtype[i],
            golden[i],
            name=f"{label} of {name}",
            factor=3.0 if dtype == torch.float32 else 2.0,
            rms_factor=rms_factor,
        )
    lse, exact_lse = results[1].cpu(), exact[1]
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    error = (lse - exact_lse)[exact_lse.isfinite()].abs()
    # An error e in the log-sum-exp scales a row of probabilities by 1 + e: far below a bf16 digit.
    assert not error.numel() or error.max() < 2**-12


@each_implementation
@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "length", "lengths"),
    [
        (64, 67, [67]),
        (80, 63, [63, 50]),
        (96, 65, [1, 65, 64]),
        (128, 201, [130, 199]),
        (64, 16, [0, 16]),
        (8, 1, [1]),
    ],
)
def test_as_accurate_as_its_precision_allows(name, dtype, head_dim, length, lengths, generator):
    inputs = draw_inputs((len(lengths), length, 2, head_dim), generator, dtype)
    results = run(name, inputs, lengths, head_dim**-0.5)
    judge(name, results, inputs, lengths, head_dim**-0.5)


@each_implementation
@pytest.mark.parametrize("sharpness", [6.0, 0.01])
def test_sharp_and_flat_scores(name, sharpness, generator):
    inputs = draw_inputs((2, 70, 2, 64), generator, torch.bfloat16)
    inputs[0] *= sharpness
    judge(name, run(name, inputs, [70, 33], 0.125), inputs, [70, 33], 0.125)


@each_implementation
def test_large_values_do_not_overflow(name, generator):
    inputs = draw_inputs((1, 40, 1, 16), generator)
    inputs[0] *= 1e3
    inputs[1] *= 1e3
    for result in run(name, inputs, [40], 1.0):
        assert result.isfinite().all()


@pytest.mark.parametrize("text_lengths", TEXT_LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_implementations_agree_and_can_be_mixed(text_lengths, dtype, generator):
    """Forward by one, backward by another: outputs and log-sum-exp mean the same to all."""
    shape = (len(text_lengths), NUM_VIDEO + NUM_TEXT, 2, 32)
    inputs = draw_inputs(shape, generator, dtype)
    lengths = [NUM_VIDEO + n for n in text_lengths]
    scale = 32**-0.5
    q, k, v, dout = inputs
    kv_len = torch.tensor(lengths)
    modules = implementations(ROOM)
    for first, second in itertools.product(modules, modules):
        out, lse = modules[first].forward(q, k, v, kv_len, scale)
        gradients = modules[second].backward(dout, out, lse, q, k, v, kv_len, scale)
        judge(second, [out, lse, *gradients], inputs, lengths, scale)


@each_implementation
def test_no_lengths_mean_full_lengths(name, generator):
    inputs = draw_inputs((2, 37, 2, 16), generator)
    whole = run(name, inputs, None, 0.25)
    for result, expected in zip(run(name, inputs, [37, 37], 0.25), whole, strict=True):
        assert_equal(result, expected)
    judge(name, whole, inputs, [37, 37], 0.25)


@each_implementation
def test_a_sample_does_not_depend_on_its_batch(name, generator):
    inputs = draw_inputs((3, 41, 2, 32), generator)
    lengths = [41, 1, 29]
    together = run(name, inputs, lengths, 0.2)
    for item, length in enumerate(lengths):
        alone = run(name, [x[item : item + 1] for x in inputs], [length], 0.2)
        for result, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(result[item : item + 1], expected, rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_is_never_felt(name, garbage, generator):
    lengths = [0, 1, 20, 30]
    clean = draw_inputs((4, 30, 2, 16), generator)
    spoiled = [x.clone() for x in clean]
    for x, item in itertools.product(spoiled, range(4)):
        x[item, lengths[item] :] = garbage
    results = run(name, spoiled, lengths, 0.25)
    for result, expected in zip(results, run(name, clean, lengths, 0.25), strict=True):
        assert_equal(result, expected)


@each_implementation
def test_a_sample_without_tokens_is_zero(name, generator):
    out, lse, *gradients = run(name, draw_inputs((2, 9, 1, 8), generator), [0, 9], 1.0)
    for result in (out, *gradients):
        assert not result[0].any()
        assert result[1].any()
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()


@each_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_a_valid_row_stays_in_its_sample(name, bad, generator):
    inputs = draw_inputs((2, 12, 1, 8), generator)
    inputs[1][0, 3, 0, 2] = bad
    out = run(name, inputs, [12, 12], 1.0)[0]
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@each_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[23, 23], [23, 11]], ids=str)
def test_strides_do_not_matter(name, layout, lengths, generator):
    """Including the gradient of the output, which a concatenation or a sum hands back as a view."""
    inputs = [with_layout(x, layout) for x in draw_inputs((2, 23, 2, 16), generator)]
    results = run(name, inputs, lengths, 0.25)
    expected = run(name, [x.contiguous() for x in inputs], lengths, 0.25)
    for result, wanted in zip(results, expected, strict=True):
        # Not bit for bit: matrix products sum in an order that depends on the alignment.
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_sum_is_an_expanded_zero_stride_tensor(generator):
    q, k, v, _ = draw_inputs((1, 9, 2, 8), generator)
    q.requires_grad_()
    attention(q, k, v).sum().backward()
    (expected,) = torch.autograd.grad(attention(q, k, v), q, torch.ones(1, 9, 2, 8))
    assert_equal(q.grad, expected)


@each_implementation
@pytest.mark.parametrize("lengths", [None, [19, 19], [19, 0], [7, 7]], ids=str)
def test_out_may_be_a_view_beside_other_results(name, lengths, generator):
    q, k, v, _ = draw_inputs((2, 19, 3, 8), generator)
    kv_len = None if lengths is None else torch.tensor(lengths)
    beside = Fenced((2, 19, 3 * 8), torch.float32, gap=40)
    view = beside.view.unflatten(-1, (3, 8))
    with use(name, ROOM):
        expected, expected_lse = attention(q, k, v, kv_len=kv_len, return_lse=True)
        result, lse = attention(q, k, v, kv_len=kv_len, out=view, return_lse=True)
    assert result is view
    beside.check()
    assert_equal(view, expected)
    assert_equal(lse, expected_lse)


@each_implementation
def test_backward_is_deterministic(name, generator):
    inputs = draw_inputs((2, 50, 2, 32), generator, torch.bfloat16)
    first = run(name, inputs, [50, 31], 0.2)
    for _ in range(5):
        for result, expected in zip(run(name, inputs, [50, 31], 0.2), first, strict=True):
            assert_equal(result, expected)


@each_implementation
@pytest.mark.parametrize("lengths", [None, [5, 3, 0]], ids=str)
def test_gradcheck(name, lengths, generator, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 2)
    shape = (3, 5, 2, 3)
    q, k, v, _ = draw_inputs(shape, generator, torch.float64)
    kv_len = None if lengths is None else torch.tensor(lengths)
    if reason := implementations(ROOM)[name].supports(q, k, v, kv_len, 0.7):
        pytest.skip(reason)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with use(name, ROOM):
        assert torch.autograd.gradcheck(lambda *x: attention(*x, kv_len=kv_len, scale=0.7), leaves)


def test_reference_does_not_depend_on_its_blocks(generator, monkeypatch):
    inputs = draw_inputs((2, 21, 2, 8), generator, torch.float64)
    whole = run("reference", inputs, [21, 13], 0.5)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 4)
    for result, expected in zip(run("reference", inputs, [21, 13], 0.5), whole, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


@each_implementation
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_need_no_gradient(name, needed, generator):
    q, k, v, dout = draw_inputs((1, 11, 2, 8), generator)
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
@each_implementation
def test_registration(name, lengths, generator):
    q, k, v, dout = draw_inputs((2, 12, 2, 8), generator)
    kv_len = None if lengths is None else torch.tensor(lengths)
    ops = torch.ops.hunyuan_fast
    with use(name, ROOM):
        out, lse = ops.attention(q, k, v, kv_len, 0.3)
        beside = torch.zeros(2, 12, 5, 8)[:, :, 1:3]
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [[333], [0, 333], [1, 200, 333]], ids=str)
@each_implementation
def test_on_a_gpu(name, dtype, head_dim, lengths, generator):
    """Judged as a kernel that keeps its sums in fp32, unlike torch's on the CPU."""
    inputs = draw_inputs((len(lengths), 333, 2, head_dim), generator, dtype, "cuda")
    for x, item in itertools.product(inputs, range(len(lengths))):
        x[item, lengths[item] :] = torch.nan
    results = run(name, inputs, lengths, head_dim**-0.5)
    judge("FlashAttention", results, inputs, lengths, head_dim**-0.5)
