"""Frame-causal attention by the kernels that come with torch, one call for every frame.

On the CPU the flash kernel answers, on CUDA the memory-efficient one, which knows no limit to D.
Both return the log-sum-exp that their backward reads, so nothing else is kept. The gradients of
keys and values are sums over frames, added up in fp32; the kernels round the share of each frame.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

VERIFIED_ON = frozenset({"cpu"})

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_forward = torch.ops.aten._efficient_attention_forward
_cuda_backward = torch.ops.aten._efficient_attention_backward
# The CUDA kernels read the log-sum-exp in rows of a multiple of this.
_LSE_ALIGNMENT = 32


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> str | None:
    """``None`` when torch has a kernel for these tensors, else the reason."""
    if q.device.type not in ("cpu", "cuda"):
        return f"torch brings attention kernels for cpu and cuda, got {q.device.type}"
    if q.numel() == 0:
        return f"the tensors are empty, got q of shape {tuple(q.shape)}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the features of q, k and v must be adjacent in memory"
    if q.device.type == "cpu":
        return None
    if q.dtype == torch.float64:
        return f"memory-efficient attention takes float32 and 16 bits, got {q.dtype}"
    if any(each % 8 for x in (q, k, v) for each in (*x.stride()[:-1], x.shape[-1])):
        return "memory-efficient attention takes head_dim and strides in steps of 8"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, Lq, N, D) and log-sum-exp (B, N, Lq)."""
    run = _forward_cpu if q.device.type == "cpu" else _forward_cuda
    batch, queries, num_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((batch, num_heads, queries), dtype=lse_dtype)
    for rows, visible in frames(q, k, tokens_per_frame, query_tokens):
        result, sums = run(q[:, rows], k[:, :visible], v[:, :visible], scale)
        out[:, rows] = result
        lse[:, :, rows] = sums
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
    run = _backward_cpu if q.device.type == "cpu" else _backward_cuda
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    return gradients_by_frame(
        partial(run, scale=scale), (dout, out, lse), (q, k, v), tokens_per_frame, query_tokens
    )


def gradients_by_frame(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    results: tuple[Tensor, Tensor, Tensor],
    heads: tuple[Tensor, Tensor, Tensor],
    tokens_per_frame: int,
    query_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; those of keys and values are sums over frames.

    run: ``run(dout, out, lse, q, k, v)``, gradients of one frame's queries, and of what they see
    results, heads: dout, out and lse; q, k and v
    """
    dout, out, lse = results
    q, k, v = heads
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=accumulate) for x in (k, v))
    for rows, visible in frames(q, k, tokens_per_frame, query_tokens):
        of_queries = dout[:, rows], out[:, rows], lse[:, :, rows], q[:, rows]
        dq[:, rows], key_share, value_share = run(*of_queries, k[:, :visible], v[:, :visible])
        dk[:, :visible] += key_share
        dv[:, :visible] += value_share
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def frames(
    q: Tensor, k: Tensor, tokens_per_frame: int, query_tokens: int | None
) -> list[tuple[slice, int]]:
    """The queries of every frame, and how many keys, the first ones, they see."""
    queries, keys = q.shape[1], k.shape[1]
    step = tokens_per_frame if query_tokens is None else query_tokens
    ends = range(step, queries + 1, step)
    return [
        (slice(end - step, end), keys - (queries - end) // step * tokens_per_frame) for end in ends
    ]


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _cpu_forward(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2), lse


def _backward_cpu(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, out, q, k, v = (x.transpose(1, 2) for x in (dout, out, q, k, v))
    gradients = _cpu_backward(dout, q, k, v, out, lse, 0.0, False, scale=scale)
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _forward_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    nothing = None, None, None, None, None  # bias, boundaries, longest sequences
    out, lse, *_ = _cuda_forward(q, k, v, *nothing, 0.0, 0, True, scale=scale)
    return out, lse[:, :, : q.shape[1]]


def _backward_cuda(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse = F.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=torch.inf)
    lengths = q.shape[1], k.shape[1]
    # Without dropout the kernel reads no random state; it still asks for two tensors of that kind.
    random = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
    dq, dk, dv, _ = _cuda_backward(
        *(dout, q, k, v, None, out, None, None, *lengths, lse, 0.0, *random, 0, False), scale=scale
    )
    return dq, dk, dv
