"""Attention over e4m3 codes on Hopper: its tensor cores and its copy engine.

What comes before, statistics and codes, is linear in the tokens: Triton makes them, or the
reference where there is no Triton.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.fp8_attention.reference import CODE, Codes, Statistics

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_HEAD_DIM = 128  # kFeatures in csrc/fp8_attention/sm90_layout.h
_QUERY_TILE = 128  # kQueryRows there
_MOST_TILES = 2**31 - 2**10  # of queries: they are counted in 31 bits


def supports(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> str | None:
    """None, or why the CUDA kernel cannot answer this call."""
    batch, length, num_heads, head_dim = q.shape
    if head_dim != _HEAD_DIM:
        return f"the head dimension must be {_HEAD_DIM}, it is {head_dim}"
    if not q.numel():
        return f"the tensors must not be empty, the shape of q is {tuple(q.shape)}"
    tiles = batch * num_heads * -(-length // _QUERY_TILE)
    if tiles > _MOST_TILES:
        return f"there must be at most {_MOST_TILES} tiles of queries, there are {tiles}"
    if q.device.type != "cuda":
        return f"q must be on a CUDA device, it is on {q.device}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) != (9, 0):
        return f"the GPU must be sm_90, it is sm_{major}{minor}"
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
    known: Statistics = _coder().statistics(k, v, kv_len)
    return known


def quantize(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, known: Statistics
) -> Codes:
    """The codes of q, of k and v about their means; zeros past ``kv_len``."""
    codes: Codes = _coder().quantize(q, k, v, kv_len, scale, known)
    return codes


def attend(codes: Codes, kv_len: Tensor | None, out: Tensor) -> Tensor:
    """Attention over codes, written into ``out`` (B, L, N, D), which it returns."""
    tensors = [x.view(torch.uint8) if x.dtype == CODE else x for x in codes]
    result = out if _is_aligned(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        _C.fp8_attention_hopper(*tensors, kv_len, result, stream)
    return out if result is out else out.copy_(result)


@cache
def _coder() -> ModuleType:
    name = "triton_impl" if find_spec("triton") else "reference"
    return import_module(f"hunyuan_fast.kernels.fp8_attention.{name}")


def _is_aligned(t: Tensor) -> bool:
    """Whether features are adjacent, and every row begins at a pair of them."""
    steps = [t.stride(axis) for axis in range(3) if t.shape[axis] > 1]
    start = t.data_ptr() % (2 * t.element_size())
    return t.stride(3) == 1 and not start and all(step % 2 == 0 for step in steps)
