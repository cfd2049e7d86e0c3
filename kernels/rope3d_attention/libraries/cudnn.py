"""Attention of cuDNN, as it comes with torch.

Samples of one length take its dense kernel, in the layout (B, L, N, D) seen as (B, N, L, D). With
``kv_len`` the kernel reads boundaries; torch then plans its graph anew in every call, on the host.
"""

import os
from functools import cache

import torch
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import prefixes

VERIFIED_ON: frozenset[str] = frozenset()

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
# For samples of different lengths; not every torch has both.
_forward_ragged = getattr(torch.ops.aten, "_cudnn_attention_forward", None)
_backward_ragged = getattr(torch.ops.aten, "_cudnn_attention_backward", None)

_OLDEST = 90000
# Boundaries are multiplied by strides in 32 bits.
_MOST_NUMBERS = 2**31 - 1


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """``None`` when the kernel takes these tensors, else the reason."""
    reason = prefixes.half_unfit(q, k, v, "cuDNN attention", widest=128)
    if reason is not None:
        return reason
    if q_len is not None:
        return "cuDNN attention is given queries of the tokens of the keys here, and no q_len"
    if reason := _lacking():
        return reason
    if kv_len is not None and not (_forward_ragged and _backward_ragged):
        return "this torch has no cuDNN attention for samples of different lengths"
    if kv_len is not None and q.numel() > _MOST_NUMBERS:
        return f"cuDNN attention counts up to {_MOST_NUMBERS} numbers, got {q.numel()}"
    major, minor = prefixes.capability(q.device.index)
    if major < 8:
        return f"cuDNN attention needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


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
    batch, length, num_heads, _ = q.shape
    if kv_len is None:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        result, lse, *_ = _forward(*heads, None, True, 0.0, False, False, scale=scale)
        result, lse = result.transpose(1, 2), lse.view(batch, num_heads, length)
    else:
        ends, padding = prefixes.halves(q, kv_len), prefixes.padding_of(q, kv_len)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        result, lse, *_ = _forward_ragged(
            *flat, None, ends, ends, length, length, True, 0.0, False, False, scale=scale
        )
        result = prefixes.without_padding(result.unflatten(0, (batch, length)), padding)
        # Here a row of the log-sum-exp is a token, and its numbers are heads.
        lse = prefixes.heads_first(lse.view(-1, num_heads).T.contiguous(), batch, padding)
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
    batch, length, num_heads, _ = q.shape
    # Gradients come in the strides of their tensors, and torch plans with those of q for out and
    # dout as well: all of them alike and without gaps leaves nothing to be guessed.
    given = [x.contiguous() for x in (dout, q, k, v, out)]
    # Without dropout the kernel reads no random state; it still asks for two tensors of that kind.
    random = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
    lengths = length, length, 0.0, False
    if kv_len is None:
        heads = (x.transpose(1, 2) for x in given)
        rows = lse.contiguous().view(batch, num_heads, length, 1)
        gradients = _backward(*heads, rows, *random, None, None, None, *lengths, scale=scale)
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv
    ends, padding = prefixes.halves(q, kv_len), prefixes.padding_of(q, kv_len)
    flat = (x.flatten(0, 1) for x in given)
    rows = prefixes.flattened(lse).T.contiguous().view(-1, num_heads, 1)
    gradients = _backward_ragged(*flat, rows, *random, None, ends, ends, *lengths, scale=scale)
    dq, dk, dv = (
        prefixes.without_padding(x.unflatten(0, (batch, length)), padding) for x in gradients
    )
    return dq, dk, dv


@cache
def _lacking() -> str | None:
    version = torch.backends.cudnn.version() or 0
    if version < _OLDEST:
        return f"cuDNN must be 9 or newer, got {version or 'none'}"
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") != "0":
        return "with TORCH_CUDNN_SDPA_AVOID_RECOMPILE the log-sum-exp is in another order"
    return None
