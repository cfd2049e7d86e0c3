"""FlashAttention 3, the module ``flash_attn_interface``: Hopper, lengths as numbers of rows.

Boundaries are those of whole samples; how many rows of each are used is ``kv_len``.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import installed, prefixes

VERIFIED_ON: frozenset[str] = frozenset()

_MODULE = "flash_attn_interface"
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_NEEDS = {
    "_flash_attn_forward": (*_LENGTHS, "seqused_q", "seqused_k", "causal"),
    # The names of the two are spelt so in the package.
    "_flash_attn_backward": (*_LENGTHS, "sequed_q", "sequed_k", "is_causal", "dq", "dk", "dv"),
}


def supports(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> str | None:
    """``None`` when the package is here and takes these tensors, else the reason."""
    reason = _missing()
    if reason is None:
        reason = prefixes.half_unfit(q, k, v, "FlashAttention 3")
    if reason is None and prefixes.capability(q.device.index) != (9, 0):
        return "FlashAttention 3 needs compute capability 9.0"
    return reason


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L)."""
    batch, length = q.shape[:2]
    run = _library()._flash_attn_forward
    if kv_len is None:
        result, lse, *_ = run(q, k, v, softmax_scale=scale, causal=False)
    else:
        padding = prefixes.padding_of(q, kv_len)
        used = prefixes.used_rows(kv_len)
        result, lse, *_ = run(
            *(x.flatten(0, 1) for x in (q, k, v)),
            **_boundaries(q),
            seqused_q=used,
            seqused_k=used,
            softmax_scale=scale,
            causal=False,
        )
        result = prefixes.without_padding(result.unflatten(0, (batch, length)), padding)
        lse = prefixes.heads_first(lse, batch, padding)
    return (result if out is None else out.copy_(result)), lse


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
    run = _library()._flash_attn_backward
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    given, into = (dout, q, k, v, out), {"dq": dq, "dk": dk, "dv": dv}
    if kv_len is None:
        run(*given, lse.contiguous(), **into, softmax_scale=scale, is_causal=False)
        return dq, dk, dv
    padding = prefixes.padding_of(q, kv_len)
    used = prefixes.used_rows(kv_len)
    run(
        *(x.flatten(0, 1) for x in given),
        prefixes.flattened(lse),
        **{name: x.flatten(0, 1) for name, x in into.items()},
        **_boundaries(q),
        sequed_q=used,
        sequed_k=used,
        softmax_scale=scale,
        is_causal=False,
    )
    dq, dk, dv = (prefixes.without_padding(x, padding) for x in (dq, dk, dv))
    return dq, dk, dv


def _boundaries(q: Tensor) -> dict[str, Tensor | int]:
    batch, length = q.shape[:2]
    ends = prefixes.starts(batch, length, q.device)
    both = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    return {**both, "max_seqlen_q": length, "max_seqlen_k": length}


@cache
def _missing() -> str | None:
    return installed.lacking(_MODULE, "flash-attn-3", _NEEDS)


@cache
def _library() -> ModuleType:
    return import_module(_MODULE)
