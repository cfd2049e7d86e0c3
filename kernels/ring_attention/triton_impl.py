"""The merge of two partial attentions in Triton: one program per some tokens of a head."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from hunyuan_fast.kernels.ring_attention.config import merge_block

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _shares(lse, part_lse):
    # of the larger one the weight is 1, of the other one e; where both have seen nothing, none
    most = tl.maximum(lse, part_lse, propagate_nan=tl.PropagateNan.ALL)
    anchor = tl.where(most == -float("inf"), 0.0, most)
    first = tl.exp(lse - anchor)
    second = tl.exp(part_lse - anchor)
    total = first + second
    total = tl.where(total == 0.0, 1.0, total)
    return first / total, second / total, most + tl.log(total)


@triton.jit
def _forward_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    new_out_ptr,
    new_lse_ptr,
    length,
    num_heads,
    dim,
    stride_ob,
    stride_ol,
    stride_on,
    stride_pb,
    stride_pl,
    stride_pn,
    stride_rb,
    stride_rl,
    stride_rn,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(length, BLOCK_L)
    # heads fastest: they are adjacent in memory; int64: a row may start past element 2^31
    n = (tl.program_id(0) % num_heads).to(tl.int64)
    b = (tl.program_id(0) // num_heads // num_blocks).to(tl.int64)
    block = tl.program_id(0) // num_heads % num_blocks
    l = (block * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = l < length
    inside = here[:, None] & (d < dim)[None, :]
    at = (b * num_heads + n) * length + l
    lse = tl.load(lse_ptr + at, mask=here, other=0.0)
    part_lse = tl.load(part_lse_ptr + at, mask=here, other=0.0)
    first, second, new_lse = _shares(lse, part_lse)
    out_at = out_ptr + b * stride_ob + l[:, None] * stride_ol + n * stride_on + d[None, :]
    part_at = part_ptr + b * stride_pb + l[:, None] * stride_pl + n * stride_pn + d[None, :]
    # what has no share is not read
    out = tl.load(out_at, mask=inside & (first != 0.0)[:, None], other=0.0)
    part = tl.load(part_at, mask=inside & (second != 0.0)[:, None], other=0.0)
    merged = first[:, None] * out + second[:, None] * part.to(tl.float32)
    new_at = new_out_ptr + b * stride_rb + l[:, None] * stride_rl + n * stride_rn + d[None, :]
    tl.store(new_at, merged, mask=inside)
    tl.store(new_lse_ptr + at, new_lse, mask=here)


@triton.jit
def _backward_kernel(
    dout_ptr,
    dlse_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    dfirst_ptr,
    dfirst_lse_ptr,
    dpart_ptr,
    dpart_lse_ptr,
    length,
    num_heads,
    dim,
    stride_gb,
    stride_gl,
    stride_gn,
    stride_ob,
    stride_ol,
    stride_on,
    stride_pb,
    stride_pl,
    stride_pn,
    HAS_DLSE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(length, BLOCK_L)
    n = (tl.program_id(0) % num_heads).to(tl.int64)
    b = (tl.program_id(0) // num_heads // num_blocks).to(tl.int64)
    block = tl.program_id(0) // num_heads % num_blocks
    l = (block * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = l < length
    inside = here[:, None] & (d < dim)[None, :]
    at = (b * num_heads + n) * length + l
    lse = tl.load(lse_ptr + at, mask=here, other=0.0)
    part_lse = tl.load(part_lse_ptr + at, mask=here, other=0.0)
    first, second, _ = _shares(lse, part_lse)
    dout_at = dout_ptr + b * stride_gb + l[:, None] * stride_gl + n * stride_gn + d[None, :]
    out_at = out_ptr + b * stride_ob + l[:, None] * stride_ol + n * stride_on + d[None, :]
    part_at = part_ptr + b * stride_pb + l[:, None] * stride_pl + n * stride_pn + d[None, :]
    both = inside & ((first != 0.0) & (second != 0.0))[:, None]
    dout = tl.load(dout_at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_at, mask=both, other=0.0)
    part = tl.load(part_at, mask=both, other=0.0).to(tl.float32)
    delta = tl.sum(tl.where(both, dout * (out - part), 0.0), axis=1)
    through = first * second * delta
    new_at = ((b * length + l[:, None]) * num_heads + n) * dim + d[None, :]
    dfirst = tl.where((first != 0.0)[:, None], first[:, None] * dout, 0.0)
    dpart = tl.where((second != 0.0)[:, None], second[:, None] * dout, 0.0)
    tl.store(dfirst_ptr + new_at, dfirst, mask=inside)
    tl.store(dpart_ptr + new_at, dpart.to(dpart_ptr.dtype.element_ty), mask=inside)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + at, mask=here, other=0.0)
        of_first = tl.where(first != 0.0, first * dlse, 0.0)
        of_part = tl.where(second != 0.0, second * dlse, 0.0)
    else:
        of_first = tl.zeros_like(first)
        of_part = tl.zeros_like(second)
    tl.store(dfirst_lse_ptr + at, of_first + through, mask=here)
    tl.store(dpart_lse_ptr + at, of_part - through, mask=here)


def supports(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, in_place: bool = False
) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if out.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"out must be on a CUDA device, it is on {out.device}"
    if out.dtype != torch.float32:
        return f"out must be float32, it is {out.dtype}"
    if part.dtype not in _DTYPES:
        return f"part must be float32, bfloat16 or float16, it is {part.dtype}"
    return None


def forward(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """The merged out (B, L, N, D) and lse (B, N, L); in their places if that is wanted."""
    there = in_place and out.stride(-1) == 1
    new_out = out if there else _new(out)
    new_lse = lse if in_place and lse.is_contiguous() else _new(lse)
    _launch_forward(_rows(out), lse.contiguous(), _rows(part), part_lse, new_out, new_lse)
    if in_place:
        new_out = out if there else out.copy_(new_out)
        new_lse = lse if new_lse is lse else lse.copy_(new_lse)
    return new_out, new_lse


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out, lse, part and part_lse as they were before the merge."""
    gradients = _new(out), _new(lse), _new(part), _new(part_lse)
    batch, length, num_heads, dim = out.shape
    if not lse.numel():
        return gradients
    dout, out, part = _rows(dout), _rows(out), _rows(part)
    dfirst, dfirst_lse, dpart, dpart_lse = gradients
    config = merge_block(dim)
    programs = batch * triton.cdiv(length, config.rows) * num_heads
    with _device_of(out):
        _backward_kernel[(programs,)](
            *(dout, lse if dlse is None else dlse.contiguous(), out, lse.contiguous()),
            *(part, part_lse.contiguous(), dfirst, dfirst_lse, dpart, dpart_lse),
            *(length, num_heads, dim),
            *(*dout.stride()[:3], *out.stride()[:3], *part.stride()[:3]),
            HAS_DLSE=dlse is not None,
            BLOCK_L=config.rows,
            BLOCK_D=config.width,
            num_warps=config.num_warps,
        )
    return gradients


def _launch_forward(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, new_out: Tensor, new_lse: Tensor
) -> None:
    batch, length, num_heads, dim = out.shape
    if not lse.numel():
        return
    config = merge_block(dim)
    programs = batch * triton.cdiv(length, config.rows) * num_heads
    with _device_of(out):
        _forward_kernel[(programs,)](
            *(out, lse, part, part_lse.contiguous(), new_out, new_lse),
            *(length, num_heads, dim),
            *(*out.stride()[:3], *part.stride()[:3], *new_out.stride()[:3]),
            BLOCK_L=config.rows,
            BLOCK_D=config.width,
            num_warps=config.num_warps,
        )


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
