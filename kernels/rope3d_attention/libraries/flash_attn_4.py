"""FlashAttention 4, the package ``flash-attn-4``: Hopper and Blackwell, lengths as numbers of rows.

Its kernels are compiled when they are first called. Boundaries are those of whole samples; how many
rows of each are used is ``kv_len``.
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
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> str | None:
    """``None`` when the package is here and takes these tensors, else the reason."""
    reason = _missing()
    if reason is None:
        reason = prefixes.half_unfit(q, k, v, "FlashAttention 4", widest=128)
    if reason is None and prefixes.capability(q.device.index)[0] not in (9, 10, 11):
        return "FlashAttention 4 needs compute capability 9, 10 or 11"
    return reason


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L)."""
    batch, length = q.shape[:2]
    run = _library()._flash_attn_fwd
    options = {"softmax_scale": scale, "causal": False, "return_lse": True}
    if kv_len is None:
        result, lse, *_ = run(q, k, v, **options)
    else:
        padding = prefixes.padding_of(q, kv_len)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        result, lse, *_ = run(*flat, **_lengths(q, kv_len), **options)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, L, N, D)."""
    batch, length = q.shape[:2]
    run = _library()._flash_attn_bwd
    given = q, k, v, out, dout
    options = {"softmax_scale": scale, "causal": False}
    if kv_len is None:
        dq, dk, dv, *_ = run(*given, lse.contiguous(), **options)
        return dq, dk, dv
    padding = prefixes.padding_of(q, kv_len)
    flat = (x.flatten(0, 1) for x in given)
    gradients = run(*flat, prefixes.flattened(lse), **_lengths(q, kv_len), **options)
    dq, dk, dv = (
        prefixes.without_padding(x.unflatten(0, (batch, length)), padding) for x in gradients[:3]
    )
    return dq, dk, dv


def _lengths(q: Tensor, kv_len: Tensor) -> dict[str, Any]:
    batch, length = q.shape[:2]
    ends, used = prefixes.starts(batch, length, q.device), prefixes.used_rows(kv_len)
    both = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "seqused_q": used, "seqused_k": used}
    return {**both, "max_seqlen_q": length, "max_seqlen_k": length}


@cache
def _missing() -> str | None:
    return installed.lacking(_MODULE, "flash-attn-4", _NEEDS)


@cache
def _library() -> ModuleType:
    return import_module(_MODULE)
