"""FlashAttention 3, the module ``flash_attn_interface``: Hopper, lengths as numbers of rows.

Boundaries are those of whole samples; how many rows of each are used say ``q_len`` and ``kv_len``.
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
        reason = prefixes.flash_unfit(q, k, v, scale, "FlashAttention 3")
    if reason is None and prefixes.capability(q.device.index) != (9, 0):
        return "FlashAttention 3 needs compute capability 9.0"
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
    run = _library()._flash_attn_forward
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        result, lse, *_ = run(q, k, v, softmax_scale=scale, causal=False)
    else:
        padding = prefixes.padding_of(q, meeting[0])
        used, used_keys = prefixes.used(meeting)
        result, lse, *_ = run(
            *(x.flatten(0, 1) for x in (q, k, v)),
            **_boundaries(q, k),
            seqused_q=used,
            seqused_k=used_keys,
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
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like q, k and v."""
    run = _library()._flash_attn_backward
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    given, into = (dout, q, k, v, out), {"dq": dq, "dk": dk, "dv": dv}
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        run(*given, lse.contiguous(), **into, softmax_scale=scale, is_causal=False)
        return dq, dk, dv
    used, used_keys = prefixes.used(meeting)
    run(
        *(x.flatten(0, 1) for x in given),
        prefixes.flattened(lse),
        **{name: x.flatten(0, 1) for name, x in into.items()},
        **_boundaries(q, k),
        sequed_q=used,
        sequed_k=used_keys,
        softmax_scale=scale,
        is_causal=False,
    )
    return prefixes.gradients(dq, dk, dv, meeting)


def _boundaries(q: Tensor, k: Tensor) -> dict[str, Tensor | int]:
    ends, key_ends = prefixes.wholes(q, k)
    both = {"cu_seqlens_q": ends, "cu_seqlens_k": key_ends}
    return {**both, "max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}


@cache
def _missing() -> str | None:
    return installed.lacking(_MODULE, "flash-attn-3", _NEEDS)


@cache
def _library() -> ModuleType:
    return import_module(_MODULE)
