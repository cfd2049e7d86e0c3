"""FlashAttention as it comes with torch: the second generation, unless another is activated.

``torch.nn.attention.activate_flash_attention_impl`` puts FlashAttention 3 or 4 behind the same two
operators; a measured ranking then holds for that one.
"""

import torch
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import prefixes

VERIFIED_ON: frozenset[str] = frozenset()

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


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
    return prefixes.flash_unfit(q, k, v, scale, "FlashAttention")


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
    batch, length = q.shape[:2]
    options = length, k.shape[1], 0.0, False, False
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        result, lse, *_ = _forward(q, k, v, None, None, *options, scale=scale)
    else:
        ends, padding = prefixes.boundaries(q, k, meeting), prefixes.padding_of(q, meeting[0])
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        result, lse, *_ = _forward(*flat, *ends, *options, scale=scale)
        result = prefixes.without_padding(result.unflatten(0, (batch, length)), padding)
        lse = prefixes.heads_first(lse, batch, padding)
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
    # Without dropout the kernel reads no random state; it still asks for two tensors of that kind.
    random = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    options = q.shape[1], k.shape[1], 0.0, False, *random
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in (dout, q, k, v, out)]
    meeting = prefixes.meeting(k, kv_len, q_len)
    if meeting is None:
        # Kernels of equal lengths are told so by two missing tensors.
        dq, dk, dv = _backward(*given, lse, None, None, *options, scale=scale)
        return dq, dk, dv
    flat = [x.flatten(0, 1) for x in given]
    ends = prefixes.boundaries(q, k, meeting)
    found = _backward(*flat, prefixes.flattened(lse), *ends, *options, scale=scale)
    dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(found, (q, k, v), strict=True))
    return prefixes.gradients(dq, dk, dv, meeting)
