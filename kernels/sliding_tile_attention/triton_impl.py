"""Sliding-tile attention in Triton: one kernel forward, two backward, no atomics.

Forward and for dq a program takes a block of queries of one tile through the keys that it sees;
for dk and dv a program takes a block of keys through the queries that see it. Every sum is made in
fp32 by one program in a fixed order: the same bits at every run. Heads that see everything are not
cut into tiles.
"""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.sliding_tile_attention.config import (
    MAX_HEAD_DIM,
    Tile,
    forward_tile,
    key_gradient_tile,
    query_gradient_tile,
)
from hunyuan_fast.kernels.sliding_tile_attention.triton_kernels import (
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from hunyuan_fast.kernels.sliding_tile_attention.windows import Sizes, tiles

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.bfloat16, torch.float16)
# Numbers of tokens, up to a block past the last, are divided by sides of boxes in 31 bits.
_BLOCK, _MOST = 2**10, 2**31


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    grid: Sizes,
    tile: Sizes,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
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
    if (q.shape[1] + _BLOCK) * max(grid[1:]) >= _MOST:
        return f"L times the longer of H and W must stay below 2^31, L is {q.shape[1]}"
    if out is not None and out.stride(-1) != 1:
        return "the features of out must be adjacent in memory"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    grid: Sizes,
    tile: Sizes,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L)."""
    batch, length, num_heads, head_dim = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((batch, num_heads, length), dtype=torch.float32)
    chosen = forward_tile(head_dim, math.prod(tile), _hopper(q))
    with _device_of(q):
        forward_kernel[_programs(q, grid, tile, chosen.queries)](
            *(q, k, v, out, lse),
            *_described(windows, kv_len, q, grid, tile, scale),
            *_strides(q, k, v, out),
            **_constants(head_dim, chosen, kv_len),
        )
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    grid: Sizes,
    tile: Sizes,
    kv_len: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, L, N, D)."""
    head_dim = q.shape[-1]
    dout, out, q, k, v = (_rows(x) for x in (dout, out, q, k, v))
    lse = lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    described = _described(windows, kv_len, q, grid, tile, scale)
    with _device_of(q):
        chosen = query_gradient_tile(head_dim, math.prod(tile), _hopper(q))
        query_gradient_kernel[_programs(q, grid, tile, chosen.queries)](
            *(dout, out, lse, q, k, v, dq, delta),
            *described,
            *_strides(dout, out, q, k, v),
            **_constants(head_dim, chosen, kv_len),
        )
        chosen = key_gradient_tile(head_dim, math.prod(tile), _hopper(q))
        key_gradient_kernel[_programs(q, grid, tile, chosen.keys)](
            *(dout, lse, delta, q, k, v, dk, dv),
            *described,
            *_strides(dout, q, k, v),
            **_constants(head_dim, chosen, kv_len),
        )
    return dq, dk, dv


def _programs(q: Tensor, grid: Sizes, tile: Sizes, block: int) -> tuple[int, int]:
    """Blocks of the text and of every tile, for each head; those past a smaller tile's end stop."""
    text = q.shape[1] - math.prod(grid)
    blocks = triton.cdiv(text, block) + math.prod(tiles(grid, tile)) * triton.cdiv(
        math.prod(tile), block
    )
    return blocks, q.shape[0] * q.shape[2]


def _described(
    windows: Tensor, kv_len: Tensor | None, q: Tensor, grid: Sizes, tile: Sizes, scale: float
) -> tuple[Any, ...]:
    """The pattern and the sizes, as all kernels take them."""
    # Without lengths the kernel reads none; it still asks for a tensor.
    lengths = windows if kv_len is None else kv_len.contiguous()
    return windows.contiguous(), lengths, q.shape[2], q.shape[1], *grid, *tile, scale


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(head_dim: int, tile: Tile, kv_len: Tensor | None) -> dict[str, Any]:
    return {
        "D": head_dim,
        "BLOCK_D": tile.block,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "HAS_LENGTHS": kv_len is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _hopper(x: Tensor) -> bool:
    """Whether products read both factors from shared memory: Hopper, and what came after."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
