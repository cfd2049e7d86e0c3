"""What kernels that are not ours need to keep to valid prefixes, with no word from the device.

Kernels of variable length read boundaries in the flattened batch. One that takes the number of
used rows as well is told ``kv_len``. For any other, every sample becomes two sequences, its prefix
and its padding, so nothing is gathered; what the padding computes for itself is replaced by zeros.
"""

from functools import cache

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; asking takes longer than a small kernel."""
    return torch.cuda.get_device_capability(index)


def unfit(
    q: Tensor, k: Tensor, v: Tensor, name: str, dtypes: tuple[torch.dtype, ...], widest: int
) -> str | None:
    """Why a kernel for CUDA with these limits cannot take the tensors; ``None`` when it can."""
    if q.device.type != "cuda":
        return f"{name} runs on cuda, got {q.device.type}"
    if q.dtype not in dtypes:
        takes = " and ".join(str(dtype)[6:] for dtype in dtypes)
        return f"{name} takes {takes}, got {q.dtype}"
    head_dim = q.shape[-1]
    if head_dim % 8 or head_dim > widest:
        return f"{name} takes head_dim up to {widest} in steps of 8, got {head_dim}"
    if q.numel() == 0:
        return f"the tensors are empty, got q of shape {tuple(q.shape)}"
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "the features of q, k and v must be adjacent in memory"
    return None


def half_unfit(q: Tensor, k: Tensor, v: Tensor, name: str, widest: int = 256) -> str | None:
    """``unfit`` of a kernel for 16 bits."""
    return unfit(q, k, v, name, _HALF, widest)


def starts(batch: int, length: int, device: torch.device) -> Tensor:
    """Where every sample of the flattened batch starts, and its end: (batch + 1,) int32."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def halves(q: Tensor, kv_len: Tensor) -> Tensor:
    """Boundaries of prefix, padding, prefix, padding, ... in the flattened batch: (2 B + 1,)."""
    batch, length = q.shape[:2]
    firsts = starts(batch, length, q.device)
    pairs = torch.stack((firsts[:-1], firsts[:-1] + kv_len.to(torch.int32)), dim=1)
    return torch.cat((pairs.flatten(), firsts[-1:]))


def used_rows(kv_len: Tensor) -> Tensor:
    """``kv_len`` as kernels take it: int32, without gaps."""
    return kv_len.to(torch.int32).contiguous()


def padding_of(q: Tensor, kv_len: Tensor) -> Tensor:
    """Which tokens are padding: (B, L)."""
    return torch.arange(q.shape[1], device=q.device) >= kv_len[:, None]


def without_padding(x: Tensor, padding: Tensor) -> Tensor:
    """x (B, L, N, D) with zeros for padding, in place. A select: what was there may be NaN."""
    return x.masked_fill_(padding[:, :, None, None], 0)


def heads_first(lse: Tensor, batch: int, padding: Tensor | None) -> Tensor:
    """Log-sum-exp (N, B L) of a flattened batch as (B, N, L), -inf for padding."""
    num_heads = lse.shape[0]
    result = lse.view(num_heads, batch, -1).transpose(0, 1).contiguous()
    return result if padding is None else result.masked_fill_(padding[:, None], -torch.inf)


def flattened(lse: Tensor) -> Tensor:
    """Log-sum-exp (B, N, L) as (N, B L), +inf for padding, which makes its probabilities zero."""
    rows = lse.transpose(0, 1).flatten(1)
    return rows.masked_fill(rows.isneginf(), torch.inf)
