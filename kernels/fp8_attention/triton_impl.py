"""Attention over e4m3 codes in Triton: statistics in two kernels, codes in two, attention in one.

All sums are made in fp32 by one program in a fixed order: the same bits at every run.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.fp8_attention.config import (
    CHUNK,
    MAX_HEAD_DIM,
    STEP,
    attend_tile,
    lanes_of,
    num_chunks,
    num_warps_of,
)
from hunyuan_fast.kernels.fp8_attention.reference import (
    CODE,
    KEY_BLOCK,
    KEY_FACTOR,
    QUERY_BLOCK,
    Codes,
    Statistics,
    padded_length,
    query_factor,
    rotated,
)
from hunyuan_fast.kernels.fp8_attention.triton_kernels import (
    attend_kernel,
    merge_kernel,
    rows_kernel,
    statistics_kernel,
    values_kernel,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()


def supports(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"q must be on a CUDA device, it is on {q.device}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "products of e4m3 need compute capability 8.9 or later"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head size D must be at most {MAX_HEAD_DIM}, it is {q.shape[-1]}"
    if q.shape[-1] % 16:
        return f"the head size D must be a multiple of 16, it is {q.shape[-1]}"
    if q.numel() == 0:
        return f"the tensors are empty, q has shape {tuple(q.shape)}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention (B, L, N, D), written into ``out`` if given."""
    if out is None:
        out = q.new_empty(q.shape)
    codes = quantize(q, k, v, kv_len, scale, statistics(k, v, kv_len))
    return attend(codes, kv_len, out)


def statistics(k: Tensor, v: Tensor, kv_len: Tensor | None) -> Statistics:
    """Means of keys and values, and the largest distance of a value from its mean."""
    batch, length, num_heads, head_dim = k.shape
    k, v, lengths = _rows(k), _rows(v), _packed(kv_len)
    chunks = num_chunks(length)
    parts = k.new_empty((4, batch, num_heads, chunks, head_dim), dtype=torch.float32)
    known = Statistics(*(parts.new_empty((batch, num_heads, head_dim)) for _ in range(3)))
    sizes = num_heads, length, chunks
    width = {"D": head_dim, "BLOCK_D": lanes_of(head_dim)}
    with _device_of(k):
        statistics_kernel[(chunks, batch * num_heads)](
            *(k, v, lengths, parts),
            *sizes,
            *(*k.stride()[:3], *v.stride()[:3]),
            **width,
            CHUNK=CHUNK,
            STEP=STEP,
        )
        merge_kernel[(1, batch * num_heads)](parts, lengths, *known, *sizes, **width, num_warps=1)
    return known


def quantize(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, known: Statistics
) -> Codes:
    """The codes of q, of k and v about their means; zeros past ``kv_len``."""
    batch, length, num_heads, head_dim = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    known = Statistics(*(x.contiguous() for x in known))
    lengths = _packed(kv_len)
    padded = padded_length(length)
    heads = batch, num_heads

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty((*heads, *shape), dtype=dtype)

    codes = Codes(
        q=new(padded, head_dim, dtype=CODE),
        q_scale=new(padded // QUERY_BLOCK),
        k=new(padded, head_dim, dtype=CODE),
        k_scale=new(padded // KEY_BLOCK),
        v=new(head_dim, padded, dtype=CODE),
        v_scale=known.value_peak * KEY_FACTOR,
        v_mean=known.value_mean,
    )
    sizes = num_heads, length, padded
    width = {"D": head_dim, "BLOCK_D": lanes_of(head_dim)}
    with _device_of(q):
        for x, mean, result, scales, factor, rows in (
            (q, None, codes.q, codes.q_scale, query_factor(scale, head_dim), QUERY_BLOCK),
            (k, known.key_mean, codes.k, codes.k_scale, KEY_FACTOR, KEY_BLOCK),
        ):
            rows_kernel[(padded // rows, batch * num_heads)](
                *(x, mean, lengths, result, scales),
                *(*sizes, factor, *x.stride()[:3]),
                **width,
                ROWS=rows,
                STAGES=rotated(head_dim).bit_length() - 1,
                num_warps=num_warps_of(rows),
            )
        values_kernel[(padded // KEY_BLOCK, batch * num_heads)](
            *(v, known.value_mean, known.value_peak, lengths, codes.v),
            *(*sizes, *v.stride()[:3]),
            **width,
            KEYS=KEY_BLOCK,
        )
    return codes


def attend(codes: Codes, kv_len: Tensor | None, out: Tensor) -> Tensor:
    """Attention over codes, written into ``out`` (B, L, N, D), which it returns."""
    batch, length, num_heads, head_dim = out.shape
    large = not out.is_cuda or torch.cuda.get_device_capability(out.device)[0] in (9, 10)
    tile = attend_tile(head_dim, large_memory=large)
    with _device_of(out):
        attend_kernel[(triton.cdiv(length, tile.queries), batch * num_heads)](
            *codes,
            *(_packed(kv_len), out),
            *(num_heads, length, padded_length(length), *out.stride()),
            D=head_dim,
            BLOCK_D=tile.block,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _packed(kv_len: Tensor | None) -> Tensor | None:
    """Lengths that lie side by side, as kernels read them."""
    return None if kv_len is None else kv_len.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
