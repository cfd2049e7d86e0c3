"""The memory-efficient attention that comes with torch; of its kernels the one for fp32 on CUDA."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast.kernels.rope3d_attention import prefixes

VERIFIED_ON: frozenset[str] = frozenset()

_forward = torch.ops.aten._efficient_attention_forward.default
_backward = torch.ops.aten._efficient_attention_backward.default

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The kernels read the log-sum-exp in rows of a multiple of this.
_LSE_ALIGNMENT = 32
_NO_MASK = 0


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """``None`` when the kernel takes these tensors, else the reason."""
    reason = prefixes.unfit(q, k, v, "memory-efficient attention", _DTYPES, 512)
    if reason is None and any(each % 8 for x in (q, k, v) for each in x.stride()[:-1]):
        return "memory-efficient attention takes strides in steps of 8"
    return reason


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
    length = q.shape[1]
    options = 0.0, _NO_MASK, True
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        result, lse, *_ = _forward(q, k, v, None, None, None, None, None, *options, scale=scale)
        lse = lse[:, :, :length].contiguous()
    else:
        ends, padding = prefixes.boundaries(q, k, meeting), prefixes.padding_of(q, meeting[0])
        flat = (x.flatten(0, 1)[None] for x in (q, k, v))
        longest = length, k.shape[1]
        result, lse, *_ = _forward(*flat, None, *ends, *longest, *options, scale=scale)
        result = prefixes.without_padding(result.view(q.shape), padding)
        # Every sequence has its own rows, and every other sequence is padding.
        lse = lse[::2, :, :length].masked_fill(padding[:, None], -torch.inf)
    return (result if out is None else out.copy_(result)), lse


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
    longest = q.shape[1], k.shape[1]
    # Rows that stand for nothing: an infinite log-sum-exp makes their probabilities zero.
    rows = F.pad(lse, (0, -longest[0] % _LSE_ALIGNMENT), value=torch.inf)
    # Without dropout the kernel reads no random state; it still asks for two tensors of that kind.
    random = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
    options = 0.0, *random, _NO_MASK, False
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in (dout, q, k, v)]
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        dq, dk, dv, _ = _backward(
            *given, None, out, None, None, *longest, rows, *options, scale=scale
        )
        return dq, dk, dv
    rows = rows.masked_fill(rows.isneginf(), torch.inf)
    rows = torch.stack((rows, torch.full_like(rows, torch.inf)), dim=1).flatten(0, 1)
    flat = [x.flatten(0, 1)[None] for x in (*given, out)]
    ends = prefixes.boundaries(q, k, meeting)
    *found, _ = _backward(*flat[:4], None, flat[4], *ends, *longest, rows, *options, scale=scale)
    dq, dk, dv = (x.view(like.shape) for x, like in zip(found, (q, k, v), strict=True))
    return prefixes.gradients(dq, dk, dv, meeting)
