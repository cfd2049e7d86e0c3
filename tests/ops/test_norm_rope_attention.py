"""Attention straight from packed projections: the two ops behind it, and who prepares queries."""

import importlib
import os

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hunyuan_fast.dispatch import select, use
from hunyuan_fast.kernels.qk_norm_rope import reference
from hunyuan_fast.ops import attention, norm_rope_attention, qk_norm_rope
from tests.kit import hopper
from tests.kit.emulation import plain_attention
from tests.kit.memory import Fenced
from tests.kit.numerics import assert_equal
from tests.ops.qk_norm_rope_cases import DTYPES, ROOM, Call, answering_on_cpu, draw_call
from tests.ops.test_norm_rope_attention_sm90 import RawEmulator
from tests.ops.test_rope3d_attention_sm90 import emulated_by, impl

__all__ = ["impl"]  # a fixture
ATTENTION = "rope3d_attention"
ON_CPU = answering_on_cpu(os.environ.get("TRITON_INTERPRET") == "1")
each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_number_of_streams = pytest.mark.parametrize("streams", [1, 2])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def options_of(call: Call) -> dict[str, object]:
    text = dict(zip(("text_qkv", "text_q_weight", "text_k_weight"), call.text, strict=False))
    return {"num_heads": call.num_heads, "eps": call.eps, **text}


def attend(call: Call, **options) -> Tensor:
    tensors = call.qkv, *call.weights, *call.tables
    return norm_rope_attention(*tensors, **options_of(call), **options)


def apart(call: Call, **options) -> Tensor:
    heads = qk_norm_rope(call.qkv, *call.weights, *call.tables, **options_of(call))
    return attention(*heads, **options)


# ---- qk_norm_rope without q


@each_dtype
@each_number_of_streams
@each_implementation
def test_keys_and_values_alone(name, streams, dtype, generator):
    """The same bits as beside q."""
    call = draw_call(generator, streams=streams, video=7, text=4, head_dim=24, dtype=dtype)
    with use(name, ROOM):
        forward = select(ROOM, *call.arguments).forward
    _, *expected = forward(*call.arguments)
    q, *results = forward(*call.arguments, with_q=False)
    assert q is None
    for result, wanted in zip(results, expected, strict=True):
        assert result.is_contiguous()
        assert_equal(result, wanted)


# ---- the op, where nobody prepares queries


@each_dtype
@each_number_of_streams
@pytest.mark.parametrize("lengths", [None, [9, 0], [4, 7]], ids=str)
def test_the_same_bits_as_the_two_ops(lengths, streams, dtype, generator):
    call = draw_call(generator, streams=streams, dtype=dtype)
    call.qkv[0, -1] = torch.nan
    kv_len = None if lengths is None else torch.tensor(lengths).clamp(max=8)
    for scale in (None, 0.3):
        expected = apart(call, kv_len=kv_len, scale=scale)
        assert_equal(attend(call, kv_len=kv_len, scale=scale), expected)
    beside = Fenced((2, 8, 2 * 64), dtype, gap=5)
    view = beside.view.unflatten(-1, (2, 64))
    assert attend(call, kv_len=kv_len, out=view) is view
    beside.check()
    assert_equal(view, apart(call, kv_len=kv_len))


def test_double_precision_and_nothing_at_all(generator):
    call = draw_call(generator, dtype=torch.float64)
    call = Call(**{**vars(call), "tables": tuple(t.double() for t in call.tables)})
    assert_equal(attend(call), apart(call))
    none = draw_call(generator, batch=0)
    assert attend(none).shape == (0, 8, 2, 64)


@pytest.mark.parametrize("name", ["library_impl", "library_impl.cpu_flash"])
def test_a_library_that_wants_adjacent_features_answers(name, generator):
    """It is asked before there is a q."""
    call = draw_call(generator, dtype=torch.float32)
    with use(name, ATTENTION):
        assert_equal(attend(call), apart(call))


@each_number_of_streams
def test_registration(streams, generator):
    call = draw_call(generator, streams=streams, dtype=torch.bfloat16)
    arguments = *call.arguments, torch.tensor([8, 5]), 0.125
    ops = torch.ops.hunyuan_fast
    opcheck(ops.norm_rope_attention.default, arguments)
    beside = torch.zeros(2, 8, 5, 64, dtype=torch.bfloat16)[:, :, 1:3]
    opcheck(ops.norm_rope_attention_out.default, (*arguments, beside))


def test_compiles_whole(generator):
    call = draw_call(generator)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    kv_len = torch.tensor([8, 5])
    assert_equal(compiled(call, kv_len=kv_len), attend(call, kv_len=kv_len))


def test_refusals(generator):
    call = draw_call(generator)
    with pytest.raises(ValueError, match=r"kv_len must be \(B,\) = \(2,\), got shape \(3,\)"):
        attend(call, kv_len=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"kv_len must lie in \[0, L\] = \[0, 8\], got \[9, 1\]"):
        attend(call, kv_len=torch.tensor([9, 1]))
    with pytest.raises(ValueError, match=r"out must have the shape of q, \(2, 8, 2, 64\), got"):
        attend(call, out=torch.zeros(2, 8, 2, 32))
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        attend(call, scale=float("inf"))
    with pytest.raises(ValueError, match="eps must be positive"):
        attend(Call(**{**vars(call), "eps": 0.0}))
    call.qkv.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients"):
        attend(call)
    with torch.no_grad():
        attend(call)


# ---- where attention prepares them


@pytest.fixture
def preparing(impl, monkeypatch) -> RawEmulator:
    """The Hopper kernel, emulated, is whom attention is left to."""
    module = importlib.import_module("hunyuan_fast.ops.norm_rope_attention")

    def chosen(op, *args):
        return impl if op == ATTENTION else select(op, *args)

    monkeypatch.setattr(module, "select", chosen)
    return emulated_by(RawEmulator(), impl, monkeypatch)


@pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")
@each_number_of_streams
def test_queries_are_prepared_by_attention(streams, preparing, impl, monkeypatch, generator):
    call = draw_call(generator, video=75, text=40, streams=streams, dtype=torch.bfloat16)
    kv_len = torch.tensor([115, 80])
    monkeypatch.setattr(impl, "forward", None)  # nobody needs it
    out = attend(call, kv_len=kv_len)
    heads = (x.double() for x in reference.forward(*call.arguments))
    exact, _ = plain_attention(*heads, [115, 80], 0.125)
    assert (out - exact).abs().max() < 2**-6
    into = torch.empty_like(out)
    assert attend(call, kv_len=kv_len, out=into) is into
    assert_equal(into, out)


@pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")
def test_rows_that_begin_anywhere_are_prepared_before(preparing, generator):
    call = draw_call(generator, video=20, text=9, streams=1, dtype=torch.bfloat16)
    wide = torch.zeros(2, 29, call.qkv.shape[2] + 3, dtype=torch.bfloat16)
    shifted = wide[..., 1:-2].copy_(call.qkv)
    moved = Call(**{**vars(call), "qkv": shifted})
    got, wanted = attend(moved).double(), attend(call).double()
    assert (got - wanted).abs().max() < 2**-6
