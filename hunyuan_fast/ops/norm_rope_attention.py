"""Joint attention straight from packed projections, for inference.

The rooms of ``qk_norm_rope`` and ``rope3d_attention`` answer, one after the other. Where attention
prepares its queries itself, the former makes keys and values alone, and no q is in memory.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.attention_checks import check_kv_len, check_lengths, check_out
from hunyuan_fast.ops.memory import check_apart
from hunyuan_fast.ops.operator import define
from hunyuan_fast.ops.qk_norm_rope import ARGUMENTS, check_arguments

_HEADS, _ATTENTION = "qk_norm_rope", "rope3d_attention"


def norm_rope_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    text_qkv: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``attention(*qk_norm_rope(qkv, ...), kv_len=kv_len, scale=scale, out=out)``.

    qkv to eps: as in :func:`qk_norm_rope`; kv_len, scale, out: as in :func:`attention`. The same
    bits as the two, except where a kernel prepares the queries itself: as near the truth.

    Returns (B, L, N, D) of the joint sequence. Inference only: there are no gradients.
    Raises TypeError or ValueError as the two do, and ValueError where a gradient is wanted.
    """
    text = text_qkv, text_q_weight, text_k_weight
    tensors = qkv, q_weight, k_weight, cos, sin
    check_arguments(*tensors, num_heads, *text, eps)
    q = _stand_in(qkv, q_weight, num_heads, text_qkv)
    if kv_len is not None:
        check_kv_len(kv_len, q)
    if scale is None:
        scale = q_weight.shape[0] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    _check_inference((*tensors, *text))
    arguments = *tensors, num_heads, *text, float(eps), kv_len, float(scale)
    if out is None:
        return _forward(*arguments)
    check_out(out, q, q, q)
    _forward_out(*arguments, out)
    return out


def _kernel(*args: Any) -> Tensor:
    *heads, kv_len, scale = args
    return _attended(tuple(heads), kv_len, scale, ())


def _out_kernel(*args: Any) -> None:
    *heads, kv_len, scale, out = args
    check_apart(out, qkv=heads[0], text_qkv=heads[6])
    _attended(tuple(heads), kv_len, scale, (out,))


def _attended(
    heads: tuple[Any, ...], kv_len: Tensor | None, scale: float, out: tuple[Tensor, ...]
) -> Tensor:
    qkv, q_weight, _, cos, sin, num_heads, text_qkv, text_q_weight, _, eps = heads
    q = _stand_in(qkv, q_weight, num_heads, text_qkv)
    check_lengths(kv_len, q.shape[1])
    prepare = select(_HEADS, *heads).forward
    impl = select(_ATTENTION, q, q, q, kv_len, scale, *out)
    if hasattr(impl, "forward_raw") and impl.supports_raw(qkv, cos, text_qkv) is None:
        _, k, v = prepare(*heads, with_q=False)
        raw = qkv, q_weight, cos, sin, text_qkv, text_q_weight, eps
        return impl.forward_raw(*raw, k, v, kv_len, scale, *out)[0]
    call = *prepare(*heads), kv_len, scale, *out
    return select(_ATTENTION, *call).forward(*call)[0]


def _stand_in(qkv: Tensor, q_weight: Tensor, num_heads: int, text_qkv: Tensor | None) -> Tensor:
    """A tensor as q is, but that all rows are one in memory: for those who look at no values."""
    length = qkv.shape[1] if text_qkv is None else qkv.shape[1] + text_qkv.shape[1]
    head_dim = q_weight.shape[0]
    return qkv.new_empty(head_dim).expand(qkv.shape[0], length, num_heads, head_dim)


def _fake(*args: Any) -> Tensor:
    qkv, q_weight, _, _, _, num_heads, text_qkv, *_ = args
    return qkv.new_empty(_stand_in(qkv, q_weight, num_heads, text_qkv).shape)


def _fake_out(*_: Any) -> None:
    return None


_TAKEN = f"{ARGUMENTS}, Tensor? kv_len, float scale"
_forward = define(f"norm_rope_attention({_TAKEN}) -> Tensor", _kernel, _fake)
_forward_out = define(
    f"norm_rope_attention_out({_TAKEN}, Tensor(a!) out) -> ()", _out_kernel, _fake_out
)


def _check_inference(tensors: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "norm_rope_attention is for inference and has no gradients; use torch.no_grad(), or "
            "qk_norm_rope and attention"
        )
