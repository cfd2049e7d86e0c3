"""Attention by the C++ kernels: AVX-512, with products of bfloat16 where there are, AVX2 or plain.

A block of queries passes over the keys of its head with running maxima and sums; samples of all
lengths share one parallel loop, and padding is never read. Backward computes the probabilities
anew, in chunks of keys; the chunks add to dq in a fixed order, so that results are the same on any
number of threads. All sums are fp32.
"""

import torch
from torch import Tensor

from hunyuan_fast import _C

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if q.device.type != "cpu":
        return f"q must be on the CPU, it is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"q must be float32, bfloat16 or float16, it is {q.dtype}"
    return None


def prefers(arch: str, q: Tensor, *_: object) -> str | None:
    """``library_impl`` for fp32 without AVX2, where torch's own products are faster."""
    return "library_impl" if q.dtype == torch.float32 and _C.cpu_isa() == "plain" else None


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
    lse = torch.empty((batch, num_heads, length), dtype=torch.float32)
    result = torch.empty(q.shape, dtype=q.dtype) if out is None or out.stride(-1) != 1 else out
    if q.numel():
        _C.rope3d_attention_forward_cpu(
            *map(_rows, (q, k, v)), kv_len, q_len, scale, result, lse, torch.get_num_threads()
        )
    if out is None or out is result:
        return result, lse
    return out.copy_(result), lse


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
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    _C.rope3d_attention_backward_cpu(
        *(_rows(dout), _rows(out), lse.contiguous(), *map(_rows, (q, k, v)), kv_len, q_len, scale),
        *(dq, dk, dv, torch.get_num_threads()),
    )
    return dq, dk, dv


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()
