"""FlashAttention 4, the package ``flash-attn-4``: Hopper and Blackwell, lengths as numbers of rows.

Its kernels are compiled when they are first called. Boundaries are those of whole samples; how many
rows of each are used say ``q_len`` and ``kv_len``.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import installed, prefixes

VERIFIED_ON: frozenset[str] = frozenset()

_MODULE = "flash_attn.cute.interface"
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q")
_LENGTHS += ("max_seqlen_k", "softmax_scale", "causal")
_NEEDS = {
    "_flash_attn_fwd": (*_LENGTHS, "return_lse"),
    "_flash_attn_bwd": _LENGTHS,
}


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """``None`` when the package is here and takes these tensors, else the reason."""
    reason = _missing()
    if reason is None:
        reason = prefixes.flash_unfit(q, k, v, scale, "FlashAttention 4", widest=128)
    if reason is None and prefixes.capability(q.device.index)[0] not in (9, 10, 11):
        return "FlashAttention 4 needs compute capability 9, 10 or 11"
    return reason


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L)."""
    batch, length = q.shape[:2]
    run = _library()._flash_attn_fwd
    options = {"softmax_scale": scale, "causal": False, "return_lse": True}
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        result, lse, *_ = run(q, k, v, **options)
    else:
        padding = prefixes.padding_of(q, meeting[0])
        flat = (x.flatten(0, 1) for x in (q, k, v))
        result, lse, *_ = run(*flat, **_lengths(q, k, meeting), **options)
        result = prefixes.without_padding(result.unflatten(0, (batch, length)), padding)
        lse = prefixes.heads_first(lse, batch, padding)
    return (result if out is None else out.copy_(result)), lse.contiguous()


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like q, k and v."""
    run = _library()._flash_attn_bwd
    given = q, k, v, out, dout
    options = {"softmax_scale": scale, "causal": False}
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        dq, dk, dv, *_ = run(*given, lse.contiguous(), **options)
        return dq, dk, dv
    flat = (x.flatten(0, 1) for x in given)
    found = run(*flat, prefixes.flattened(lse), **_lengths(q, k, meeting), **options)[:3]
    dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(found, (q, k, v), strict=True))
    return prefixes.gradients(dq, dk, dv, meeting)


def _lengths(q: Tensor, k: Tensor, meeting: prefixes.Meeting) -> dict[str, Any]:
    (ends, key_ends), (used, used_keys) = prefixes.wholes(q, k), prefixes.used(meeting)
    both = {"cu_seqlens_q": ends, "cu_seqlens_k": key_ends}
    both |= {"seqused_q": used, "seqused_k": used_keys}
    return {**both, "max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}


@cache
def _missing() -> str | None:
    return installed.lacking(_MODULE, "flash-attn-4", _NEEDS)


@cache
def _library() -> ModuleType:
    return import_module(_MODULE)
