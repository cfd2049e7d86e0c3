"""Packed projections to joint heads in Triton: a program takes a block of rows through its heads.

Each stream has a launch of its own, which writes its rows of the joint tensors. The sums for the
weights are made in registers over a chunk of rows, then over the chunks by a second kernel in a
fixed order.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hunyuan_fast.kernels.qk_norm_rope.config import (
    MAX_HEAD_DIM,
    gpu_rows_per_chunk,
    heads_per_program,
    triton_tile,
)
from hunyuan_fast.kernels.qk_norm_rope.triton_kernels import (
    backward_kernel,
    forward_kernel,
    reduce_kernel,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCE_PARTS, _REDUCE_COLUMNS = 256, 16


def supports(qkv: Tensor, q_weight: Tensor, *_: object) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if qkv.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"qkv must be on a CUDA device, it is on {qkv.device}"
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
    text_length = 0 if text_qkv is None else text_qkv.shape[1]
    shape = (batch, length + text_length, num_heads, q_weight.shape[0])
    k, v = (qkv.new_empty(shape) for _ in range(2))
    q = qkv.new_empty(shape) if with_q else None
    tables = _rows(cos), _rows(sin)
    with _device_of(qkv):
        _launch_forward(qkv, q_weight, k_weight, tables, cos.shape[0], (q, k, v), 0, eps)
        if text_qkv is not None:
            assert text_q_weight is not None and text_k_weight is not None
            heads = (q, k, v)
            _launch_forward(text_qkv, text_q_weight, text_k_weight, tables, 0, heads, length, eps)
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
    tables = _rows(cos), _rows(sin)
    heads = _rows(dq), _rows(dk), _rows(dv)
    weights = 2 if text_qkv is None else 4
    dweights = qkv.new_empty((weights, q_weight.shape[0]), dtype=torch.float32)
    with _device_of(qkv):
        dqkv = _launch_backward(
            heads, 0, qkv, q_weight, k_weight, tables, cos.shape[0], dweights[:2], eps
        )
        if text_qkv is None:
            return dqkv, None, dweights
        assert text_q_weight is not None and text_k_weight is not None
        text = text_qkv, text_q_weight, text_k_weight
        dtext_qkv = _launch_backward(heads, qkv.shape[1], *text, tables, 0, dweights[2:], eps)
    return dqkv, dtext_qkv, dweights


def _launch_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    tables: tuple[Tensor, Tensor],
    video_rows: int,
    heads: tuple[Tensor | None, Tensor, Tensor],
    first_row: int,
    eps: float,
) -> None:
    """The rows of one stream, into those of the joint tensors from ``first_row`` on."""
    batch, rows, _ = qkv.shape
    if not qkv.numel():
        return
    q, k, v = heads
    _, joint_rows, num_heads, head_dim = k.shape
    tile = triton_tile(head_dim)
    blocks = triton.cdiv(rows, tile.rows)
    per_program = heads_per_program(batch * blocks, num_heads)
    qkv = _rows(qkv)
    cos, sin = tables
    forward_kernel[(blocks * triton.cdiv(num_heads, per_program), batch)](
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        cos,
        sin,
        k if q is None else q,
        k,
        v,
        rows,
        video_rows,
        first_row,
        joint_rows,
        num_heads,
        per_program,
        *qkv.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        eps,
        D=head_dim,
        BLOCK_D=tile.block,
        ROWS=tile.rows,
        WITH_Q=q is not None,
        num_warps=tile.num_warps,
    )


def _launch_backward(
    heads: tuple[Tensor, Tensor, Tensor],
    first_row: int,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    tables: tuple[Tensor, Tensor],
    video_rows: int,
    dweights: Tensor,
    eps: float,
) -> Tensor:
    """dqkv of one stream; its two sums go into ``dweights`` (2, D)."""
    batch, rows, _ = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    if not qkv.numel():
        dweights.zero_()
        return dqkv
    num_heads, head_dim = heads[0].shape[2:]
    tile = triton_tile(head_dim)
    chunk_rows = gpu_rows_per_chunk(rows, tile)
    chunks = triton.cdiv(rows, chunk_rows)
    per_program = heads_per_program(batch * chunks, num_heads)
    programs = chunks * triton.cdiv(num_heads, per_program)
    partials = qkv.new_empty((batch * programs, 2, head_dim), dtype=torch.float32)
    qkv = _rows(qkv)
    cos, sin = tables
    backward_kernel[(programs, batch)](
        *heads,
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        cos,
        sin,
        dqkv,
        partials,
        rows,
        video_rows,
        first_row,
        num_heads,
        per_program,
        chunk_rows,
        *(stride for d in heads for stride in d.stride()[:3]),
        *qkv.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        eps,
        D=head_dim,
        BLOCK_D=tile.block,
        ROWS=tile.rows,
        num_warps=tile.num_warps,
    )
    width = 2 * head_dim
    reduce_kernel[(triton.cdiv(width, _REDUCE_COLUMNS),)](
        partials,
        dweights,
        batch * programs,
        WIDTH=width,
        PARTS=_REDUCE_PARTS,
        COLUMNS=_REDUCE_COLUMNS,
        num_warps=4,
    )
    return dqkv


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
