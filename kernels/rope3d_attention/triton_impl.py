"""Attention over valid prefixes in Triton: one kernel forward, two backward, no atomics.

Every program reads the length of its sample on the device; the host never waits for it. Forward
and for dq a program takes a block of queries through the keys; for dk and dv a block of keys
through the queries. Every sum is made in fp32 by one program in a fixed order: the same bits at
every run. The price is seven matrix products backward in place of five.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention.config import (
    MAX_HEAD_DIM,
    Tile,
    forward_tile,
    key_gradient_tile,
    query_gradient_tile,
)
from hunyuan_fast.kernels.rope3d_attention.triton_backward import (
    key_gradient_kernel,
    query_gradient_kernel,
)
from hunyuan_fast.kernels.rope3d_attention.triton_kernels import forward_kernel

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.bfloat16, torch.float16)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """``None``, or why the Triton kernels cannot answer this call."""
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"q must be on a CUDA device, it is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"q must be bfloat16 or float16, it is {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head size D must be at most {MAX_HEAD_DIM}, it is {q.shape[-1]}"
    if q.numel() == 0 or (q_len is not None and k.numel() == 0):
        return f"the tensors are empty, q has shape {tuple(q.shape)}, k {tuple(k.shape)}"
    if scale < 0:
        return f"scale must not be negative, it is {scale}"
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
    q, k, v = (_rows(x) for x in (q, k, v))
    kv_len, q_len = (_adjacent(x) for x in (kv_len, q_len))
    result = out if out is not None and out.stride(-1) == 1 else q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    tile = forward_tile(q.shape[-1], _arch(q), _aligned(q, k, v))
    with _launching(q, tile):
        forward_kernel[_grid(q, tile.queries)](
            *(q, k, v, kv_len, q_len, result, lse),
            *(q.shape[2], q.shape[1], k.shape[1], scale),
            *_strides(q, k, v, result),
            AHEAD=tile.ahead,
            **_constants(q, tile),
        )
    if out is not None and result is not out:
        out.copy_(result)
        result = out
    return result, lse


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
    dout, out, q, k, v = (_rows(x) for x in (dout, out, q, k, v))
    lse = lse.contiguous()
    kv_len, q_len = (_adjacent(x) for x in (kv_len, q_len))
    if q_len is not None:
        # A row that has seen no key has no probabilities.
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
    dq, dk, dv = (q.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    sizes = q.shape[2], q.shape[1], k.shape[1], scale
    tile = query_gradient_tile(q.shape[-1], _arch(q), _aligned(dout, out, q, k, v))
    with _launching(q, tile):
        query_gradient_kernel[_grid(q, tile.queries)](
            *(dout, out, lse, q, k, v, kv_len, q_len, dq, delta),
            *sizes,
            *_strides(dout, out, q, k, v),
            **_constants(q, tile),
        )
    tile = key_gradient_tile(q.shape[-1], _arch(q), _aligned(dout, q, k, v))
    with _launching(q, tile):
        key_gradient_kernel[_grid(k, tile.keys)](
            *(dout, lse, delta, q, k, v, kv_len, q_len, dk, dv),
            *sizes,
            *_strides(dout, q, k, v),
            **_constants(q, tile),
        )
    return dq, dk, dv


def _adjacent(lengths: Tensor | None) -> Tensor | None:
    """Lengths as the kernels read them, one behind the other."""
    return None if lengths is None else lengths.contiguous()


def _grid(x: Tensor, rows: int) -> tuple[int]:
    """Programs: blocks of rows of every head, one head after the other."""
    batch, length, num_heads, _ = x.shape
    return (triton.cdiv(length, rows) * batch * num_heads,)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(q: Tensor, tile: Tile) -> dict[str, int]:
    return {
        "D": q.shape[-1],
        "BLOCK_D": tile.block,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "TMA": tile.descriptors,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _arch(q: Tensor) -> int:
    """Compute capability without the point; the smallest where there is no GPU."""
    if not q.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(q.device)
    return 10 * major + minor


def _aligned(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can name the rows: from multiples of 16 bytes, one by one."""
    return all(
        x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in x.stride()[:3])
        and x.stride(1) > 0
        for x in tensors
    )


@contextmanager
def _launching(q: Tensor, tile: Tile) -> Iterator[None]:
    """On the device of q, with memory for the tensor descriptors that the programs make."""
    if not q.is_cuda:
        yield
        return
    with torch.cuda.device(q.device):
        if tile.descriptors:
            triton.set_allocator(_scratch)
        yield


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
