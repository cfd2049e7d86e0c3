"""Joint attention over e4m3 codes, for inference.

Formula and contract: ``hunyuan_fast.kernels.fp8_attention``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.attention_checks import (
    check_kv_len,
    check_lengths,
    check_out,
    check_tensors,
)
from hunyuan_fast.ops.memory import check_apart
from hunyuan_fast.ops.operator import define

_ROOM = "fp8_attention"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fp8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Non-causal attention of every sample over its valid prefix, both products in eight bits.

    q, k, v: (B, L, N, D), bf16, fp16 or fp32, of any strides.
    kv_len: (B,) int32 or int64, the number of valid tokens of each sample, 0 to L; ``None``: all.
        Tokens past it take no part: their outputs are zero, and what they hold, NaN included, has
        no effect.
    scale: factor of the scores, positive; 1/sqrt(D) when ``None``.
    out: (B, L, N, D) to write into, of any strides, sharing no memory with q, k or v.

    Returns (B, L, N, D) in the dtype of q. Inference only: there are no gradients.
    Raises TypeError or ValueError when shapes, dtypes, devices, lengths or scale do not fit, and
    ValueError where a gradient is wanted.
    """
    check_tensors(q, k, v)
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be bfloat16, float16 or float32, got {q.dtype}; cast it")
    if kv_len is not None:
        check_kv_len(kv_len, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    _check_inference(q, k, v)
    if out is None:
        return _forward(q, k, v, kv_len, float(scale))
    check_out(out, q, k, v)
    _forward_out(q, k, v, kv_len, float(scale), out)
    return out


def _forward_kernel(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float) -> Tensor:
    check_lengths(kv_len, q.shape[1])
    return select(_ROOM, q, k, v, kv_len, scale).forward(q, k, v, kv_len, scale)


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _out_kernel(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor
) -> None:
    check_lengths(kv_len, q.shape[1])
    check_apart(out, q=q, k=k, v=v)
    select(_ROOM, q, k, v, kv_len, scale, out).forward(q, k, v, kv_len, scale, out)


def _fake_out(q: Tensor, *_: Any) -> None:
    return None


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? kv_len, float scale"
_forward = define(f"fp8_attention({_ARGUMENTS}) -> Tensor", _forward_kernel, _fake_forward)
_forward_out = define(
    f"fp8_attention_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _out_kernel, _fake_out
)


def _check_inference(q: Tensor, k: Tensor, v: Tensor) -> None:
    wanted = [name for name, x in (("q", q), ("k", k), ("v", v)) if x.requires_grad]
    if torch.is_grad_enabled() and wanted:
        raise ValueError(
            f"fp8 attention is for inference and has no gradients, {' and '.join(wanted)} ask for "
            "one; use torch.no_grad(), or attention in the dtype of the inputs"
        )
