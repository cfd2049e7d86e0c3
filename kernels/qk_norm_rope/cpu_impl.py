"""Packed projections to joint heads by the C++ kernels: AVX-512, AVX2 or plain."""

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.qk_norm_rope.config import MAX_HEAD_DIM, rows_per_chunk

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(qkv: Tensor, q_weight: Tensor, *_: object) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if qkv.device.type != "cpu":
        return f"qkv must be on the CPU, it is on {qkv.device}"
    if qkv.dtype not in _DTYPES:
        return f"qkv must be float32, bfloat16 or float16, it is {qkv.dtype}"
    if q_weight.shape[0] > MAX_HEAD_DIM:
        return f"the head size D must be at most {MAX_HEAD_DIM}, it is {q_weight.shape[0]}"
    return None


def forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    eps: float,
    *,
    with_q: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q, k, v of the joint sequence, each (B, L, N, D)."""
    batch, length, _ = qkv.shape
    if text_qkv is not None:
        length += text_qkv.shape[1]
    shape = (batch, length, num_heads, q_weight.shape[0])
    q = torch.empty(shape, dtype=qkv.dtype) if with_q else None
    k, v = (torch.empty(shape, dtype=qkv.dtype) for _ in range(2))
    if k.numel():
        _C.qk_norm_rope_forward_cpu(
            _rows(qkv),
            _vector(q_weight),
            _vector(k_weight),
            _rows(cos),
            _rows(sin),
            None if text_qkv is None else _rows(text_qkv),
            None if text_q_weight is None else _vector(text_q_weight),
            None if text_k_weight is None else _vector(text_k_weight),
            eps,
            q,
            k,
            v,
            torch.get_num_threads(),
        )
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dqkv (B, L, 3ND), dtext_qkv like text_qkv, and the gradients of the weights, (2 or 4, D)."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    dtext_qkv = None if text_qkv is None else torch.empty(text_qkv.shape, dtype=qkv.dtype)
    sums = (2 if text_qkv is None else 4, q_weight.shape[0])
    if not dq.numel():
        return dqkv, dtext_qkv, torch.zeros(sums)
    dweights = torch.empty(sums, dtype=torch.float32)
    num_rows = dq.shape[0] * dq.shape[1]
    rows = rows_per_chunk(num_rows)
    partials = torch.empty((-(-num_rows // rows), *sums), dtype=torch.float32)
    _C.qk_norm_rope_backward_cpu(
        _rows(dq),
        _rows(dk),
        _rows(dv),
        _rows(qkv),
        _vector(q_weight),
        _vector(k_weight),
        _rows(cos),
        _rows(sin),
        None if text_qkv is None else _rows(text_qkv),
        None if text_q_weight is None else _vector(text_q_weight),
        None if text_k_weight is None else _vector(text_k_weight),
        eps,
        partials,
        rows,
        dqkv,
        dtext_qkv,
        dweights,
        torch.get_num_threads(),
    )
    return dqkv, dtext_qkv, dweights


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _vector(weight: Tensor) -> Tensor:
    """The weight as the kernels read it: fp32, which is exact, and contiguous."""
    return weight.float().contiguous()
