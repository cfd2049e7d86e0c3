"""Stand-ins for libraries that need a GPU: they check how they are called, and compute plainly.

A stand-in of an operator of torch binds the call to the operator's real schema, so an argument at
the wrong place, of the wrong type or too many is found. Stand-ins of packages have the parameters
that the packages have. What a kernel leaves unwritten is NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import prefixes
from hunyuan_fast.kernels.rope3d_attention.libraries import (
    cudnn,
    efficient,
    flash,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
)
from tests.kit.emulation import FlashAttention

LIBRARIES = (cudnn, efficient, flash, flash_attn_2, flash_attn_3, flash_attn_4)
_KERNEL = FlashAttention()
# What a type of a schema takes; SymInt and optional tensors as Python writes them.
_TYPES = {"Tensor": Tensor, "int": int, "SymInt": int, "float": float, "bool": bool}


def bound(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    schema = operator._schema.arguments
    positional = [argument for argument in schema if not argument.kwarg_only]
    assert len(args) <= len(positional), "too many arguments"
    given = dict(zip((argument.name for argument in positional), args, strict=False))
    assert not given.keys() & kwargs.keys()
    given |= kwargs
    assert given.keys() <= {argument.name for argument in schema}
    for argument in schema:
        if argument.name not in given:
            assert argument.has_default_value(), f"{argument.name} is missing"
            given[argument.name] = argument.default_value
        value, kind = given[argument.name], str(argument.type)
        optional = kind.startswith("Optional[") or kind == "Tensor"  # None: an undefined tensor
        if value is None:
            assert optional, f"{argument.name} must not be None"
            continue
        wanted = _TYPES[kind.removeprefix("Optional[").removesuffix("]")]
        assert isinstance(value, wanted), f"{argument.name} must be {kind}, got {value!r}"
    return SimpleNamespace(**given)


def segments(starts: Tensor, used: Tensor | None) -> list[slice]:
    """The rows of every sequence: whole ones, or the first ``used`` of each."""
    assert starts.dtype == torch.int32 and starts.is_contiguous()
    ends = starts[1:].tolist()
    if used is not None:
        assert used.dtype == torch.int32
        ends = [start + n for start, n in zip(starts.tolist(), used.tolist(), strict=False)]
    return [slice(*pair) for pair in zip(starts[:-1].tolist(), ends, strict=True)]


# The rows of queries and of keys of one sequence after the other.
Sequences = list[tuple[slice, slice]]


def sequences(queries: list[slice], keys: list[slice]) -> Sequences:
    return list(zip(queries, keys, strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    """Flattened q, k, v (T, N, D) -> out (T, N, D) and log-sum-exp (N, T), NaN where unused."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for asking, asked in rows:
        if _count(asking) and _count(asked):
            part = q[asking][None], k[asked][None], v[asked][None]
            numbers = [_count(asked)], scale, [_count(asking)]
            result, sums = _KERNEL.forward(*part, *numbers)
            out[asking], lse[:, asking] = result[0], sums[0]
    return out, lse


def differentiate(
    dout: Tensor, out: Tensor, lse: Tensor, qkv: list[Tensor], rows: Sequences, scale: float
) -> list[Tensor]:
    """dq, dk and dv of flattened tensors, NaN where unused; lse is (N, T)."""
    gradients = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in qkv]
    for asking, asked in rows:
        if _count(asking) and _count(asked):
            part = [x[asking][None] for x in (dout, out)]
            inputs = [x[own][None] for x, own in zip(qkv, (asking, asked, asked), strict=True)]
            numbers = [_count(asked)], scale, [_count(asking)]
            found = _KERNEL.backward(*part, lse[None, :, asking], *inputs, *numbers)
            for gradient, own, share in zip(gradients, (asking, asked, asked), found, strict=True):
                gradient[own] = share[0]
    return gradients


def _count(rows: slice) -> int:
    return rows.stop - rows.start


def _dense(x: Tensor, keys: Tensor | None = None) -> Sequences:
    found = []
    for each in (x, x if keys is None else keys):
        batch, length = each.shape[:2]
        found.append([slice(i * length, (i + 1) * length) for i in range(batch)])
    return sequences(*found)


def _flat(*tensors: Tensor) -> list[Tensor]:
    for x in tensors:
        assert x.stride(-1) == 1
    return [x.flatten(0, 1) for x in tensors]


def _ragged(starts: Tensor, key_starts: Tensor | None, *limits: int) -> Sequences:
    """Sequences between boundaries, none of which is longer than it was said to be."""
    assert key_starts is not None
    rows = segments(starts, None), segments(key_starts, None)
    for each, limit in zip(rows, limits, strict=True):
        assert isinstance(limit, int) and max(map(_count, each)) <= limit
    return sequences(*rows)


def aten_flash_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    a = bound(torch.ops.aten._flash_attention_forward.default, args, kwargs)
    assert (a.dropout_p, a.is_causal, a.return_debug_mask) == (0.0, False, False)
    if a.cum_seq_q is None:
        assert a.cum_seq_k is None and a.max_q == a.max_k == a.query.shape[1]
        out, lse = attend(*_flat(a.query, a.key, a.value), _dense(a.query), a.scale)
        batch, length = a.query.shape[:2]
        rows = lse.view(-1, batch, length).transpose(0, 1).contiguous()
        return out.view(a.query.shape), rows, None, None
    rows = _ragged(a.cum_seq_q, a.cum_seq_k, a.max_q, a.max_k)
    return *attend(a.query, a.key, a.value, rows, a.scale), None, None, None


def aten_flash_backward(*args: Any, **kwargs: Any) -> list[Tensor]:
    a = bound(torch.ops.aten._flash_attention_backward.default, args, kwargs)
    assert (a.dropout_p, a.is_causal) == (0.0, False) and a.rng_state.dtype == torch.uint64
    tensors = [a.grad_out, a.out, a.query, a.key, a.value]
    if a.cum_seq_q is None:
        assert a.logsumexp.shape == (a.query.shape[0], a.query.shape[2], a.query.shape[1])
        dout, out, *qkv = _flat(*tensors)
        lse = a.logsumexp.transpose(0, 1).flatten(1)
        found = differentiate(dout, out, lse, qkv, _dense(a.query), a.scale)
        return [x.view(a.query.shape) for x in found]
    rows = _ragged(a.cum_seq_q, a.cum_seq_k, a.max_q, a.max_k)
    assert a.logsumexp.shape == (a.query.shape[1], a.query.shape[0])
    return differentiate(*tensors[:2], a.logsumexp, tensors[2:], rows, a.scale)


def cudnn_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    a = bound(torch.ops.aten._scaled_dot_product_cudnn_attention.default, args, kwargs)
    assert a.attn_bias is None and a.compute_log_sumexp and not a.is_causal and not a.dropout_p
    q, k, v = (x.transpose(1, 2) for x in (a.query, a.key, a.value))
    out, lse = attend(*_flat(q, k, v), _dense(q), a.scale)
    batch, num_heads, length, _ = a.query.shape
    rows = lse.view(num_heads, batch, length).transpose(0, 1).contiguous()
    return (out.view(q.shape).transpose(1, 2), rows[..., None], None, None, length, length)


def cudnn_backward(*args: Any, **kwargs: Any) -> list[Tensor]:
    a = bound(torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default, args, kwargs)
    assert not a.is_causal and not a.dropout_p
    assert a.attn_bias is None and a.cum_seq_q is None and a.cum_seq_k is None
    batch, num_heads, length, _ = a.query.shape
    assert a.logsumexp.shape == (batch, num_heads, length, 1) and a.logsumexp.is_contiguous()
    tensors = [a.grad_out, a.out, a.query, a.key, a.value]
    assert len({x.stride() for x in tensors}) == 1, "torch plans with the strides of the query"
    dout, out, *qkv = _flat(*(x.transpose(1, 2) for x in tensors))
    lse = a.logsumexp[..., 0].transpose(0, 1).flatten(1)
    found = differentiate(dout, out, lse, qkv, _dense(tensors[2].transpose(1, 2)), a.scale)
    return [x.view(batch, length, num_heads, -1).transpose(1, 2) for x in found]


def cudnn_forward_ragged(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    a = bound(torch.ops.aten._cudnn_attention_forward.default, args, kwargs)
    assert a.attn_bias is None and a.compute_log_sumexp and not a.is_causal and not a.dropout_p
    rows = _ragged(a.cum_seq_q, a.cum_seq_k, a.max_q, a.max_k)
    out, lse = attend(a.query, a.key, a.value, rows, a.scale)
    return out, lse.T.contiguous()[..., None], a.cum_seq_q, a.cum_seq_k


def cudnn_backward_ragged(*args: Any, **kwargs: Any) -> list[Tensor]:
    a = bound(torch.ops.aten._cudnn_attention_backward.default, args, kwargs)
    assert a.attn_bias is None and not a.is_causal and not a.dropout_p
    tokens, num_heads, _ = a.query.shape
    assert a.logsumexp.shape == (tokens, num_heads, 1) and a.logsumexp.is_contiguous()
    rows = _ragged(a.cum_seq_q, a.cum_seq_k, a.max_q, a.max_k)
    lse = a.logsumexp[..., 0].T
    qkv = [a.query, a.key, a.value]
    return differentiate(a.grad_out, a.out, lse, qkv, rows, a.scale)


def efficient_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    a = bound(torch.ops.aten._efficient_attention_forward.default, args, kwargs)
    assert a.bias is None and a.compute_log_sumexp and not a.custom_mask_type and not a.dropout_p
    length = a.query.shape[1]
    rows = _dense(a.query, a.key)
    if a.cu_seqlens_q is not None:
        assert a.query.shape[0] == 1
        rows = _ragged(a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k)
        length = a.max_seqlen_q
    out, sums = attend(*_flat(a.query, a.key, a.value), rows, a.scale)
    lse = torch.full((len(rows), sums.shape[0], -(-length // 32) * 32), torch.nan)
    for (each, _), own in zip(rows, lse, strict=True):
        own[:, : _count(each)] = sums[:, each]
    return out.view(a.query.shape), lse, None, None, length, length


def efficient_backward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    a = bound(torch.ops.aten._efficient_attention_backward.default, args, kwargs)
    assert a.bias is None and not a.custom_mask_type and not a.dropout_p
    assert not a.bias_requires_grad and a.logsumexp.shape[-1] % 32 == 0
    rows = _dense(a.query, a.key)
    if a.cu_seqlens_q is not None:
        assert a.query.shape[0] == 1
        rows = _ragged(a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k)
    assert a.logsumexp.shape[:2] == (len(rows), a.query.shape[2])
    dout, out, *qkv = _flat(a.grad_out_, a.out, a.query, a.key, a.value)
    lse = torch.full((qkv[0].shape[1], qkv[0].shape[0]), torch.nan)
    for (each, _), own in zip(rows, a.logsumexp, strict=True):
        lse[:, each] = own[:, : _count(each)]
    found = differentiate(dout, out, lse, qkv, rows, a.scale)
    given = a.query, a.key, a.value
    return *(x.view(like.shape) for x, like in zip(found, given, strict=True)), None


def _package_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Sequences | None, scale: float
) -> tuple[Tensor, Tensor]:
    if rows is None:
        out, lse = attend(*_flat(q, k, v), _dense(q), scale)
        batch, length = q.shape[:2]
        return out.view(q.shape), lse.view(-1, batch, length).transpose(0, 1).contiguous()
    return attend(q, k, v, rows, scale)


def _package_backward(
    tensors: list[Tensor], lse: Tensor, rows: Sequences | None, scale: float
) -> list[Tensor]:
    # The packages see to it themselves.
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    dout, out, *qkv = tensors
    assert lse.is_contiguous() and lse.dtype == torch.float32
    if rows is None:
        batch, length, num_heads, _ = dout.shape
        assert lse.shape == (batch, num_heads, length)
        rows, shape = _dense(dout), dout.shape
        dout, out, *qkv = _flat(*tensors)
        lse = lse.transpose(0, 1).flatten(1)
        return [x.view(shape) for x in differentiate(dout, out, lse, qkv, rows, scale)]
    assert lse.shape == (dout.shape[1], dout.shape[0])
    return differentiate(dout, out, lse, qkv, rows, scale)


def _into(targets: tuple[Tensor, ...], found: list[Tensor]) -> None:
    for target, x in zip(targets, found, strict=True):
        target.copy_(x)


def _plain(*options: Any) -> None:
    """Nothing but plain attention is asked for: no dropout, mask, window, cap or bias."""
    assert all(option in (None, False, -1, 0.0) for option in options)


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, return_softmax,
):  # fmt: skip
    _plain(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return *_package_forward(q, k, v, None, softmax_scale), None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    _plain(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    tensors = [dout, out, q, k, v]
    _into((dq, dk, dv), _package_backward(tensors, softmax_lse, None, softmax_scale))


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
):  # fmt: skip
    _plain(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    rows = _ragged(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *_package_forward(q, k, v, rows, softmax_scale), None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    _plain(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    rows = _ragged(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    tensors = [dout, out, q, k, v]
    found = _package_backward(tensors, softmax_lse, rows, softmax_scale)
    _into((dq, dk, dv), found)


def _flash_attn_3_forward(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
):  # fmt: skip
    _plain(causal, k_new, v_new, qv, out_, cu_seqlens_k_new)
    rows = _used(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    return *_package_forward(q, k, v, rows, softmax_scale), None, None


def _flash_attn_3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
    sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
    softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
):  # fmt: skip
    _plain(is_causal)
    rows = _used(cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k)
    tensors = [dout, out, q, k, v]
    found = _package_backward(tensors, softmax_lse, rows, softmax_scale)
    _into((dq, dk, dv), found)


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
    causal=False, softcap=None, return_lse=False, out=None, lse=None,
):  # fmt: skip
    assert return_lse
    _plain(causal)
    rows = _used(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    return *_package_forward(q, k, v, rows, softmax_scale), None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    _plain(causal)
    rows = _used(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    tensors = [dout, out, q, k, v]
    return *_package_backward(tensors, lse, rows, softmax_scale), None


def _used(*given: Any) -> Sequences | None:
    """The used rows between boundaries, of queries and keys; ``None`` where nothing is given."""
    starts, key_starts, used, used_keys, longest, longest_keys = given
    assert len({x is None for x in given}) == 1
    if starts is None:
        return None
    for ends, numbers, limit in ((starts, used, longest), (key_starts, used_keys, longest_keys)):
        assert max(numbers.tolist()) <= limit and int((ends[1:] - ends[:-1]).max()) <= limit
    return sequences(segments(starts, used), segments(key_starts, used_keys))


_PACKAGES: dict[str, tuple[Callable[..., Any], ...]] = {
    "flash_attn.flash_attn_interface": (
        *(_flash_attn_forward, _flash_attn_backward),
        *(_flash_attn_varlen_forward, _flash_attn_varlen_backward),
    ),
    "flash_attn_interface": (_flash_attn_3_forward, _flash_attn_3_backward),
    "flash_attn.cute.interface": (_flash_attn_fwd, _flash_attn_bwd),
}


def package(name: str) -> ModuleType:
    """A module with the functions that we call of a package."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for function in _PACKAGES[name]:
        setattr(module, function.__name__.replace("_attn_3_", "_attn_"), function)
    return module


def forget() -> None:
    """What is known of packages is found out anew."""
    cudnn._lacking.cache_clear()
    for library in (flash_attn_2, flash_attn_3, flash_attn_4):
        library._missing.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins in the place of every library, and let them take tensors of this machine."""
    operators = {
        flash: {"_forward": aten_flash_forward, "_backward": aten_flash_backward},
        efficient: {"_forward": efficient_forward, "_backward": efficient_backward},
        cudnn: {
            "_forward": cudnn_forward,
            "_backward": cudnn_backward,
            "_forward_ragged": cudnn_forward_ragged,
            "_backward_ragged": cudnn_backward_ragged,
        },
    }
    for library, functions in operators.items():
        for name, function in functions.items():
            assert hasattr(library, name)
            monkeypatch.setattr(library, name, function)
    for name in _PACKAGES:
        monkeypatch.setitem(sys.modules, name, package(name))
    for library in (flash_attn_2, flash_attn_3, flash_attn_4):
        monkeypatch.setattr(library, "_library", lambda name=library._MODULE: sys.modules[name])
    monkeypatch.setattr(prefixes, "capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    forget()
