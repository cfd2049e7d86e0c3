"""FlashAttention 2, the package ``flash-attn``, by the two functions that its autograd calls."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import installed, prefixes

VERIFIED_ON: frozenset[str] = frozenset()

_MODULE = "flash_attn.flash_attn_interface"
# From 2.7 on a window is two numbers.
_OPTIONS = {"dropout_p": 0.0, "causal": False, "softcap": 0.0, "alibi_slopes": None}
_OPTIONS |= {"window_size_left": -1, "window_size_right": -1}
_RESULT = {"return_softmax": False}
_NEEDS = {
    "_flash_attn_varlen_forward": ("cu_seqlens_q", "max_seqlen_q", *_OPTIONS, *_RESULT),
    "_flash_attn_varlen_backward": ("cu_seqlens_q", "dq", "dk", "dv", *_OPTIONS, "deterministic"),
    "_flash_attn_forward": ("softmax_scale", *_OPTIONS, *_RESULT),
    "_flash_attn_backward": ("softmax_scale", "dq", "dk", "dv", *_OPTIONS, "deterministic"),
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
        reason = prefixes.flash_unfit(q, k, v, scale, "FlashAttention 2")
    if reason is None and prefixes.capability(q.device.index) < (8, 0):
        return "FlashAttention 2 needs compute capability 8.0 or newer"
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
    options = {"softmax_scale": scale, **_OPTIONS, **_RESULT}
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        result, lse, *_ = _library()._flash_attn_forward(q, k, v, **options)
    else:
        padding = prefixes.padding_of(q, meeting[0])
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        result, lse, *_ = _library()._flash_attn_varlen_forward(
            *flat, **_boundaries(q, k, meeting), **options
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
    options = {"softmax_scale": scale, **_OPTIONS, "deterministic": False}
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    given, into = (dout, q, k, v, out), {"dq": dq, "dk": dk, "dv": dv}
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        _library()._flash_attn_backward(*given, lse.contiguous(), **into, **options)
        return dq, dk, dv
    into = {name: x.flatten(0, 1) for name, x in into.items()}
    _library()._flash_attn_varlen_backward(
        *(x.flatten(0, 1) for x in given),
        prefixes.flattened(lse),
        **into,
        **_boundaries(q, k, meeting),
        **options,
    )
    return prefixes.gradients(dq, dk, dv, meeting)


def _boundaries(q: Tensor, k: Tensor, meeting: prefixes.Meeting) -> dict[str, Tensor | int]:
    ends, key_ends = prefixes.boundaries(q, k, meeting)
    both = {"cu_seqlens_q": ends, "cu_seqlens_k": key_ends}
    return {**both, "max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}


@cache
def _missing() -> str | None:
    return installed.lacking(_MODULE, "flash-attn", _NEEDS)


@cache
def _library() -> ModuleType:
    return import_module(_MODULE)
