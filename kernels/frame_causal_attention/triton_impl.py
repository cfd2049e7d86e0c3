"""Frame-causal attention in Triton: one kernel forward, two backward, no atomics.

Forward and for dq a program takes a block of queries of one frame through the keys that it sees;
for dk and dv a program takes a block of keys through the queries that see it. Every sum is made in
fp32 by one program in a fixed order: the same bits at every run.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.frame_causal_attention.config import (
    MAX_HEAD_DIM,
    Tile,
    forward_tile,
    key_gradient_tile,
    query_gradient_tile,
)
from hunyuan_fast.kernels.frame_causal_attention.triton_kernels import (
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.bfloat16, torch.float16)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"q must be on a CUDA device, it is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"q must be bfloat16 or float16, it is {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head size D must be at most {MAX_HEAD_DIM}, it is {q.shape[-1]}"
    if q.numel() == 0:
        return f"the tensors are empty, q has shape {tuple(q.shape)}"
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
    batch, queries, num_heads, head_dim = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, num_heads, queries), dtype=torch.float32)
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    asking = tokens_per_frame if query_tokens is None else query_tokens
    tile = forward_tile(head_dim, asking, hopper)
    programs = queries // asking * triton.cdiv(asking, tile.queries)
    with _device_of(q):
        forward_kernel[(programs, batch * num_heads * triton.cdiv(head_dim, tile.values))](
            *(q, k, v, out, lse),
            *_sizes(q, k, tokens_per_frame, asking, scale),
            *_strides(q, k, v),
            VALUES=tile.values,
            **_constants(head_dim, tile),
        )
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
    batch, queries, num_heads, head_dim = q.shape
    dout, out, q, k, v = (_rows(x) for x in (dout, out, q, k, v))
    lse = lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    asking = tokens_per_frame if query_tokens is None else query_tokens
    sizes = _sizes(q, k, tokens_per_frame, asking, scale)
    with _device_of(q):
        tile = query_gradient_tile(head_dim, asking)
        programs = queries // asking * triton.cdiv(asking, tile.queries)
        query_gradient_kernel[(programs, batch * num_heads)](
            *(dout, out, lse, q, k, v, dq, delta),
            *sizes,
            *_strides(dout, out, q, k, v),
            **_constants(head_dim, tile),
        )
        tile = key_gradient_tile(head_dim, tokens_per_frame)
        past = k.shape[1] // tokens_per_frame - queries // asking  # frames
        programs = k.shape[1] // tokens_per_frame * triton.cdiv(tokens_per_frame, tile.keys)
        key_gradient_kernel[(programs, batch * num_heads)](
            *(dout, lse, delta, q, k, v, dk, dv),
            *(num_heads, queries, past, asking, tokens_per_frame, scale),
            *_strides(dout, q, k, v),
            **_constants(head_dim, tile),
        )
    return dq, dk, dv


def _sizes(
    q: Tensor, k: Tensor, tokens_per_frame: int, asking: int, scale: float
) -> tuple[int, int, int, int, int, float]:
    """num_heads, queries, past, tokens, key_tokens, scale."""
    queries = q.shape[1]
    past = k.shape[1] - queries // asking * tokens_per_frame
    return q.shape[2], queries, past, asking, tokens_per_frame, scale


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(head_dim: int, tile: Tile) -> dict[str, int]:
    return {
        "D": head_dim,
        "BLOCK_D": tile.block,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
