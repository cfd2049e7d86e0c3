"""Sliding-tile attention by the C++ kernels of attention: rows found by their numbers.

Tokens that see the same are a group, which a block of queries takes part of; its keys are packed
row by row in any case, so those of a box cost what adjacent ones do, and nothing is gathered
before. A head that sees everything is one group, and computed as by ``rope3d_attention``. All
blocks of all heads and samples share one parallel loop.

Backward a chunk of keys, of one or several groups that are seen by the same queries each, meets the
queries that see it; the chunks add to dq in a fixed order, so that gradients are the same on any
number of threads. All sums are fp32.
"""

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.sliding_tile_attention.windows import Sizes

VERIFIED_ON = frozenset({"cpu"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """None, or why the C++ kernels cannot answer this call."""
    if q.device.type != "cpu":
        return f"q must be on the CPU, it is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"q must be float32, bfloat16 or float16, it is {q.dtype}"
    if q.numel() == 0:
        return f"the tensors are empty, q has shape {tuple(q.shape)}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the features of q, k and v must be adjacent in memory"
    return None


def prefers(arch: str, q: Tensor, *_: object) -> str | None:
    """``library_impl`` for fp32 without AVX: torch's products take 0.4 to 0.6 of the time."""
    return "library_impl" if q.dtype == torch.float32 and _C.cpu_isa() == "plain" else None


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
    batch, length, num_heads, _ = q.shape
    lse = torch.empty((batch, num_heads, length), dtype=torch.float32)
    result = torch.empty(q.shape, dtype=q.dtype) if out is None or out.stride(-1) != 1 else out
    _C.sliding_tile_attention_forward_cpu(
        *(q, k, v, windows, grid, tile, kv_len, scale, result, lse, torch.get_num_threads())
    )
    if out is None or out is result:
        return result, lse
    return out.copy_(result), lse


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
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    results = _rows(dout), _rows(out), lse.contiguous()
    _C.sliding_tile_attention_backward_cpu(
        *(*results, q, k, v, windows, grid, tile, kv_len, scale),
        *(dq, dk, dv, torch.get_num_threads()),
    )
    return dq, dk, dv


def _rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the other strides may be any."""
    return t if t.stride(-1) == 1 else t.contiguous()
