"""The merge of two partial attentions by the C++ kernels: AVX-512, AVX2 or plain, at run time."""

import torch
from torch import Tensor

from hunyuan_fast import _C

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, in_place: bool = False
) -> str | None:
    """None, or why the C++ kernels cannot answer this call."""
    if not out.is_cpu:
        return f"out must be on the CPU, it is on {out.device}"
    if out.dtype != torch.float32:
        return f"out must be float32, it is {out.dtype}"
    if part.dtype not in _DTYPES:
        return f"part must be float32, bfloat16 or float16, it is {part.dtype}"
    return None


def forward(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """The merged out (B, L, N, D) and lse (B, N, L); in their places if that is wanted."""
    if not out.numel():
        return _forward_empty(out, lse, part_lse, in_place)
    there = in_place and out.stride(-1) == 1
    new_out = out if there else _new(out)
    new_lse = lse if in_place else _new(lse)
    arguments = _rows(out), lse, _rows(part), part_lse, new_out, new_lse
    _C.ring_attention_merge_cpu(*arguments, torch.get_num_threads())
    return (out.copy_(new_out) if in_place and not there else new_out), new_lse


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out, lse, part and part_lse as they were before the merge."""
    gradients = _new(out), _new(lse), _new(part), _new(part_lse)
    if not out.numel():
        for gradient in gradients:
            gradient.zero_()
        return gradients
    results = _rows(dout.to(out.dtype)), dlse
    inputs = _rows(out), lse, _rows(part), part_lse
    _C.ring_attention_merge_backward_cpu(*results, *inputs, *gradients, torch.get_num_threads())
    return gradients


def _forward_empty(
    out: Tensor, lse: Tensor, part_lse: Tensor, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Of tensors that have no element, or rows that have none."""
    merged = torch.logaddexp(lse, part_lse)
    return (out, lse.copy_(merged)) if in_place else (_new(out), merged)


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()
