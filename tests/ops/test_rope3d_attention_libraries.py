"""Libraries that need a GPU, behind the contract: how they are called, and what becomes of it.

Stand-ins compute in their place, on the CPU. That the real ones compute the same is for a GPU to
say (``test_rope3d_attention.py``, and every ranking that is measured).
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hunyuan_fast import dispatch
from hunyuan_fast.kernels.rope3d_attention import installed, prefixes
from hunyuan_fast.kernels.rope3d_attention.libraries import (
    cpu_flash,
    cudnn,
    efficient,
    flash,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
)
from tests.ops import rope3d_attention_libraries as stand_ins
from tests.ops import rope3d_attention_parts as parts
from tests.ops.test_rope3d_attention import draw_inputs, judge

ROOM = "rope3d_attention"
each_library = pytest.mark.parametrize(
    "library", stand_ins.LIBRARIES, ids=lambda module: module.__name__.rsplit(".", 1)[-1]
)
LENGTHS = [None, [50, 50], [50, 0, 1], [33, 50, 49, 0]]


@pytest.fixture
def libraries(monkeypatch):
    stand_ins.install(monkeypatch)
    yield
    monkeypatch.undo()
    stand_ins.forget()


def run(library, inputs, lengths, scale, out=None):
    """out, lse, dq, dk, dv; padding holds NaN."""
    kv_len = None if lengths is None else torch.tensor(lengths)
    if lengths is not None:
        inputs = [x.clone() for x in inputs]
        for x, (item, length) in itertools.product(inputs, enumerate(lengths)):
            x[item, length:] = torch.nan
    q, k, v, dout = inputs
    result, lse = library.forward(q, k, v, kv_len, scale, out)
    return [result, lse, *library.backward(dout, result, lse, q, k, v, kv_len, scale)]


@each_library
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_library_computes_attention_over_prefixes(library, lengths, libraries, generator):
    batch = 2 if lengths is None else len(lengths)
    inputs = draw_inputs((batch, 50, 3, 16), generator, torch.bfloat16)
    results = run(library, inputs, lengths, 0.3)
    judge("FlashAttention", results, inputs, lengths or [50] * batch, 0.3)
    assert all(x.shape == inputs[0].shape for x in (results[0], *results[2:]))
    assert results[1].shape == (batch, 3, 50) and results[1].is_contiguous()


each_but_cudnn = pytest.mark.parametrize(
    "library",
    [each for each in stand_ins.LIBRARIES if each is not cudnn],
    ids=lambda module: module.__name__.rsplit(".", 1)[-1],
)


@each_but_cudnn
@pytest.mark.parametrize(
    ("queries", "lengths"), [([21, 7, 0], [40, 0, 33]), ([20, 21, 1], None)], ids=str
)
def test_a_library_takes_queries_of_their_own(library, queries, lengths, libraries, generator):
    q, _, _, dout = draw_inputs((3, 21, 2, 16), generator, torch.bfloat16)
    k, v, *_ = draw_inputs((3, 40, 2, 16), generator, torch.bfloat16)
    for x, numbers in ((q, queries), (dout, queries), (k, lengths), (v, lengths)):
        for item, length in enumerate(numbers or ()):
            x[item, length:] = torch.nan
    numbers = None if lengths is None else torch.tensor(lengths), 0.3
    q_len = torch.tensor(queries)
    out, lse = library.forward(q, k, v, *numbers, None, q_len)
    gradients = library.backward(dout, out, lse, q, k, v, *numbers, q_len)
    results, inputs = [out, lse, *gradients], [q, k, v, dout]
    judge("FlashAttention", results, inputs, lengths or [40] * 3, 0.3, queries)
    assert lse.is_contiguous()


@each_but_cudnn
def test_parts_of_the_keys_come_to_the_whole(library, libraries, generator):
    parts.judge_parts("FlashAttention", library, parts.draw_truth(generator, torch.bfloat16))


@each_library
@pytest.mark.parametrize("lengths", [None, [20, 7]], ids=str)
def test_an_exchange_with_torch_of_the_cpu(library, lengths, libraries, generator):
    """Forward by one, backward by the other."""
    inputs = draw_inputs((2, 20, 2, 8), generator, torch.bfloat16)
    q, k, v, dout = inputs
    kv_len = None if lengths is None else torch.tensor(lengths)
    for first, second in ((library, cpu_flash), (cpu_flash, library)):
        out, lse = first.forward(q, k, v, kv_len, 0.4)
        gradients = second.backward(dout, out, lse, q, k, v, kv_len, 0.4)
        judge("FlashAttention", [out, lse, *gradients], inputs, lengths or [20, 20], 0.4)


@each_library
@pytest.mark.parametrize("lengths", [None, [20, 7]], ids=str)
def test_strides_and_out(library, lengths, libraries, generator):
    """Views into packed tensors, a gradient that was expanded, and a result beside others."""
    packed = torch.randn(2, 20, 2, 3, 8, generator=generator).bfloat16()
    q, k, v = packed.unbind(3)
    dout = torch.ones((), dtype=q.dtype).expand(q.shape)
    beside = torch.zeros(2, 20, 5, 8, dtype=q.dtype)
    results = run(library, [q, k, v, dout], lengths, 0.4, beside[:, :, 1:3])
    assert results[0].data_ptr() == beside[:, :, 1:3].data_ptr()
    assert not beside[:, :, [0, 3, 4]].any()
    expected = run(library, [x.contiguous() for x in (q, k, v, dout)], lengths, 0.4)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


FAULTS = {
    "a boundary too far": (prefixes, "halves", lambda right: lambda *a: _moved(right(*a))),
    "padding kept": (prefixes, "without_padding", lambda right: lambda x, padding: x),
    "padding one short": (
        prefixes,
        "padding_of",
        lambda right: lambda q, kv_len: right(q, kv_len + 1),
    ),
    "the scale of the library": (flash, "forward", lambda right: _unscaled(right)),
}


def _moved(ends):
    """Every prefix takes one token of its padding."""
    moved = ends.clone()
    moved[1::2] = torch.minimum(moved[1::2] + 1, moved[2::2])
    return moved


def _unscaled(right):
    return lambda q, k, v, kv_len, scale, out=None: right(q, k, v, kv_len, q.shape[-1] ** -0.5, out)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, libraries, generator, monkeypatch):
    module, name, spoil = FAULTS[fault]
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    inputs = draw_inputs((2, 30, 2, 8), generator, torch.bfloat16)
    results = run(flash, inputs, [30, 11], 0.9)
    with pytest.raises(AssertionError):
        judge("FlashAttention", results, inputs, [30, 11], 0.9)


CALLS = {
    "an argument too many": lambda a, k: ((*a, 0), k),
    "boundaries in int64": lambda a, k: ((*a[:3], a[3].long(), *a[4:]), k),
    "no boundaries of keys": lambda a, k: ((*a[:4], None, *a[5:]), k),
    "a mask": lambda a, k: ((*a[:8], True, *a[9:]), k),
    "another name": lambda a, k: (a, {"softmax_scale": k["scale"]}),
    "a longest sequence too short": lambda a, k: ((*a[:5], 3, 3, *a[7:]), k),
}


@pytest.mark.parametrize("fault", CALLS)
def test_a_stand_in_refuses_a_wrong_call(fault, libraries, generator, monkeypatch):
    right = flash._forward
    monkeypatch.setattr(
        flash, "_forward", lambda *args, **kwargs: _call(right, *CALLS[fault](args, kwargs))
    )
    inputs = draw_inputs((2, 30, 2, 8), generator, torch.bfloat16)
    with pytest.raises((AssertionError, TypeError)):
        run(flash, inputs, [30, 11], 0.9)


def _call(function, args, kwargs):
    return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("library", "lengths", "queries"),
    # Of cuDNN with boundaries torch describes no shapes.
    [
        *((flash, None, None), (flash, [40, 13], None), (flash, None, [70, 4])),
        *((efficient, None, None), (efficient, [40, 13], None), (efficient, None, [70, 4])),
        (cudnn, None, None),
    ],
)
def test_torch_takes_the_calls_on_tensors_without_memory(library, lengths, queries):
    """The real operators of torch, as far as they go without a GPU: arguments and shapes."""
    num_queries = 40 if queries is None else 70
    q, k, v, dout = (
        torch.empty(2, length, 3, 16, dtype=torch.bfloat16, device="meta")
        for length in (num_queries, 40, 40, num_queries)
    )
    kv_len, q_len = (
        None if each is None else torch.empty(2, dtype=torch.int64, device="meta")
        for each in (lengths, queries)
    )
    out, lse = library.forward(q, k, v, kv_len, 0.25, None, q_len)
    assert out.shape == q.shape and lse.shape == (2, 3, num_queries) and lse.dtype == torch.float32
    if library is not efficient:  # whose description of backward, in torch, has no place for out
        gradients = library.backward(dout, out, lse, q, k, v, kv_len, 0.25, q_len)
        for x, like in zip(gradients, (q, k, v), strict=True):
            assert x.shape == like.shape and x.dtype == q.dtype


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"):
    return torch.empty(shape, dtype=dtype, device=device)


@each_library
def test_a_library_says_why_it_declines(library, libraries):
    def reason(x, kv_len=None):
        return library.supports(x, x, x, kv_len, 1.0)

    with FakeTensorMode():
        assert reason(fake(1, 8, 2, 64)) is None
        assert "got cpu" in reason(fake(1, 8, 2, 64, device="cpu"))
        assert "got torch.float64" in reason(fake(1, 8, 2, 64, dtype=torch.float64))
        assert "got 60" in reason(fake(1, 8, 2, 60))
        assert "got 520" in reason(fake(1, 8, 2, 520))
        assert "empty" in reason(fake(0, 8, 2, 64))
        q, k = fake(1, 8, 2, 64), fake(1, 0, 2, 64)
        assert "k of (1, 0, 2, 64)" in library.supports(q, k, k, None, 1.0, None, torch.ones(1))
        assert "adjacent" in reason(fake(1, 8, 64, 2).transpose(-1, -2).expand(1, 8, 2, 64))
    assert not library.VERIFIED_ON


def test_a_flash_attention_wants_a_positive_scale(libraries):
    """It takes the largest score before it scales: with a negative scale, the smallest."""
    with FakeTensorMode():
        q = fake(1, 8, 2, 64)
        for library in (flash, flash_attn_2, flash_attn_3, flash_attn_4):
            for scale in (-0.125, 0.0):
                assert f"got {scale}" in library.supports(q, q, q, None, scale)
        assert efficient.supports(q, q, q, None, -0.125) is None


@pytest.mark.parametrize(
    ("library", "major", "said"),
    [
        (cudnn, 7, "8.0 or newer"),
        (flash_attn_2, 7, "8.0 or newer"),
        (flash_attn_3, 8, "9.0"),
        (flash_attn_4, 8, "9, 10 or 11"),
    ],
)
def test_the_gpu_decides_too(library, major, said, libraries, monkeypatch):
    monkeypatch.setattr(prefixes, "capability", lambda index: (major, 0))
    with FakeTensorMode():
        q = fake(1, 8, 2, 64)
        assert said in library.supports(q, q, q, None, 1.0)


def test_what_cudnn_cannot_do(libraries, monkeypatch):
    lengths = torch.ones(1)
    with FakeTensorMode():
        q = fake(1, 8, 2, 64)
        assert "no q_len" in cudnn.supports(q, q, q, None, 1.0, None, lengths)
        monkeypatch.setattr(cudnn, "_backward_ragged", None)
        assert cudnn.supports(q, q, q, None, 1.0) is None
        assert "different lengths" in cudnn.supports(q, q, q, lengths, 1.0)
        huge = fake(2, 2**17, 64, 128)
        monkeypatch.setattr(cudnn, "_backward_ragged", cudnn._forward_ragged)
        assert cudnn.supports(huge, huge, huge, None, 1.0) is None
        assert "counts up to" in cudnn.supports(huge, huge, huge, lengths, 1.0)
        stand_ins.forget()
        monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
        assert "another order" in cudnn.supports(q, q, q, None, 1.0)
        stand_ins.forget()
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8907)
        assert "got 8907" in cudnn.supports(q, q, q, None, 1.0)


def test_a_package_that_is_absent_broken_or_another_declines(libraries, monkeypatch):
    def reason():
        stand_ins.forget()
        with FakeTensorMode():
            q = fake(1, 8, 2, 64)
            return flash_attn_2.supports(q, q, q, None, 1.0)

    assert reason() is None
    module = sys.modules[flash_attn_2._MODULE]

    def old(q, k, v, dropout_p, softmax_scale, causal, window_size): ...

    monkeypatch.setattr(module, "_flash_attn_forward", old)
    assert "takes no" in reason() and "window_size_left" in reason()
    monkeypatch.delattr(module, "_flash_attn_forward")
    assert reason() == "this version of flash-attn has no _flash_attn_forward"

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(installed, "import_module", broken)
    assert reason() == "flash-attn does not load: ImportError: undefined symbol: _ZN3c10"
    monkeypatch.delitem(sys.modules, flash_attn_2._MODULE)
    assert reason() == "flash-attn is not installed"


def test_parameters_of_an_operator_are_known():
    @torch.library.custom_op("hunyuan_fast_tests::packaged", mutates_args=())
    def packaged(q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        return q * softmax_scale

    assert installed._parameters(packaged) == ["q", "softmax_scale"]
    assert installed._parameters(torch.ops.hunyuan_fast_tests.packaged.default) == [
        "q",
        "softmax_scale",
    ]


def test_a_library_answers_by_name(generator):
    q, k, v, _ = draw_inputs((1, 9, 2, 8), generator)
    with dispatch.use("library_impl.cpu_flash", ROOM):
        assert dispatch.select(ROOM, q, k, v, None, 0.3) is cpu_flash
    with (
        dispatch.use("library_impl.flash", ROOM),
        pytest.raises(RuntimeError, match=r"library_impl\.flash was asked for .* got cpu"),
    ):
        dispatch.select(ROOM, q, k, v, None, 0.3)
    with (
        pytest.raises(ValueError, match=r"must be one of .* got 'library_impl\.nonsense'"),
        dispatch.use("library_impl.nonsense", ROOM),
    ):
        pytest.fail("the block must not be entered")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [None, [333], [0, 333], [1, 200, 333]], ids=str)
@each_library
def test_a_library_on_a_gpu(library, dtype, head_dim, lengths, generator):
    batch = 2 if lengths is None else len(lengths)
    inputs = draw_inputs((batch, 333, 2, head_dim), generator, dtype, "cuda")
    kv_len = None if lengths is None else torch.tensor(lengths, device="cuda")
    if reason := library.supports(*inputs[:3], kv_len, 1.0):
        pytest.skip(reason)
    for x, (item, length) in itertools.product(inputs, enumerate(lengths or ())):
        x[item, length:] = torch.nan
    q, k, v, dout = inputs
    out, lse = library.forward(q, k, v, kv_len, head_dim**-0.5)
    gradients = library.backward(dout, out, lse, q, k, v, kv_len, head_dim**-0.5)
    results = [out, lse, *gradients]
    judge("FlashAttention", results, inputs, lengths or [333] * batch, head_dim**-0.5)
