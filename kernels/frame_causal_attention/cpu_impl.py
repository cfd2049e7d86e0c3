"""Frame-causal attention by the C++ kernels of joint attention, one call for every frame.

What the queries of a frame see is a prefix of the keys: a view, of which nothing is copied. The
gradients of keys and values are sums over frames, added up in fp32; the kernels round the share of
each frame.
"""

import torch
from torch import Tensor

from hunyuan_fast.kernels.frame_causal_attention.library_impl import frames, gradients_by_frame
from hunyuan_fast.kernels.rope3d_attention import cpu_impl as joint

VERIFIED_ON = frozenset({"cpu"})


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if q.numel() == 0:
        return f"the tensors are empty, q has shape {tuple(q.shape)}"
    return joint.supports(q, k, v, None, scale)


def prefers(arch: str, q: Tensor, *_: object) -> str | None:
    """``library_impl`` where joint attention leaves fp32 to torch."""
    return joint.prefers(arch, q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, Lq, N, D) and log-sum-exp (B, N, Lq)."""
    batch, queries, num_heads, _ = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((batch, num_heads, queries), dtype=torch.float32)
    asking = _asking(q, tokens_per_frame, query_tokens)
    for rows, visible in frames(q, k, tokens_per_frame, query_tokens):
        tensors = q[:, rows], k[:, :visible], v[:, :visible]
        _, lse[:, :, rows] = joint.forward(*tensors, None, scale, out[:, rows], asking)
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes."""
    dout, out, q, k, v = (_rows(x) for x in (dout, out, q, k, v))
    asking = _asking(q, tokens_per_frame, query_tokens)

    def run(*of_frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return joint.backward(*of_frame, None, scale, asking)

    return gradients_by_frame(run, (dout, out, lse), (q, k, v), tokens_per_frame, query_tokens)


def _asking(q: Tensor, tokens_per_frame: int, query_tokens: int | None) -> Tensor:
    """``q_len`` of the queries of a frame: all that it has."""
    return torch.full(q.shape[:1], tokens_per_frame if query_tokens is None else query_tokens)


def _rows(t: Tensor) -> Tensor:
    """The tensor with its features adjacent, once for all frames."""
    return t if t.stride(-1) == 1 else t.contiguous()
