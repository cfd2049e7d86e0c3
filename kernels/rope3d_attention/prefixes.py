"""What kernels that are not ours need to keep to valid prefixes, with no word from the device.

Kernels of variable length read boundaries in the flattened batch. One that takes the number of
used rows as well is told ``kv_len``. For any other, every sample becomes two sequences, its prefix
and its padding, so nothing is gathered; what the padding computes for itself is replaced by zeros.

Queries of their own (``q_len``) have boundaries of their own. Where a sample has no queries or no
keys, all of both are padding.
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
    if q.numel() == 0 or k.shape[1] == 0:
        return f"the tensors are empty, got q of shape {tuple(q.shape)}, k of {tuple(k.shape)}"
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "the features of q, k and v must be adjacent in memory"
    return None


def half_unfit(q: Tensor, k: Tensor, v: Tensor, name: str, widest: int = 256) -> str | None:
    """``unfit`` of a kernel for 16 bits."""
    return unfit(q, k, v, name, _HALF, widest)


def flash_unfit(
    q: Tensor, k: Tensor, v: Tensor, scale: float, name: str, widest: int = 256
) -> str | None:
    """``unfit`` of a FlashAttention, which looks for the largest score before it scales them."""
    if scale <= 0:  # it would be the smallest, and powers of the others overflow
        return f"{name} takes a positive scale, got {scale}"
    return half_unfit(q, k, v, name, widest)


# How many queries and how many keys of each sample take part: some of both, or none.
Meeting = tuple[Tensor, Tensor]


def meeting(k: Tensor, kv_len: Tensor | None, q_len: Tensor | None) -> Meeting | None:
    """What the lengths of a call come to; ``None`` when everything takes part."""
    if q_len is None:
        return None if kv_len is None else (kv_len, kv_len)
    keys = torch.full_like(q_len, k.shape[1]) if kv_len is None else kv_len
    return torch.where(keys > 0, q_len, 0), torch.where(q_len > 0, keys, 0)


def boundaries(q: Tensor, k: Tensor, meeting: Meeting) -> tuple[Tensor, Tensor]:
    """``halves`` of the queries, and of the keys."""
    queries, keys = meeting
    ends = halves(q, queries)
    return ends, (ends if keys is queries else halves(k, keys))


def wholes(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``starts`` of the queries, and of the keys."""
    ends = starts(*q.shape[:2], q.device)
    return ends, (ends if k.shape[1] == q.shape[1] else starts(*k.shape[:2], k.device))


def used(meeting: Meeting) -> tuple[Tensor, Tensor]:
    """``used_rows`` of the queries, and of the keys."""
    queries, keys = meeting
    rows = used_rows(queries)
    return rows, (rows if keys is queries else used_rows(keys))


def gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, meeting: Meeting
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (B, L, N, D) with zeros for padding, in place."""
    queries, keys = meeting
    padding = padding_of(dq, queries)
    of_keys = padding if keys is queries else padding_of(dk, keys)
    return (
        without_padding(dq, padding),
        without_padding(dk, of_keys),
        without_padding(dv, of_keys),
    )


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
