"""Frame-causal attention in plain PyTorch, frame by frame.

Scores exist for ``QUERY_BLOCK`` queries at a time, so memory grows with L and not with its square.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})
QUERY_BLOCK = 512


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Arguments of a typical call: two frames of 8 x 8 latents, one head of 512."""
    q, k, v = (torch.zeros(1, 128, 1, 512, dtype=torch.bfloat16, device=device) for _ in range(3))
    return q, k, v, 64, 512**-0.5


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, Lq, N, D) and log-sum-exp (B, N, Lq)."""
    query, key, value = (_heads_first(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(query.shape[:-1], dtype=query.dtype, device=q.device)
    for rows, visible in _blocks(q.shape[1], k.shape[1], tokens_per_frame, query_tokens):
        scores = scale * (query[:, :, rows] @ key[:, :, :visible].mT)
        lse[:, :, rows] = scores.logsumexp(-1)
        probabilities = torch.exp(scores - lse[:, :, rows, None])
        out[:, rows] = (probabilities @ value[:, :, :visible]).transpose(1, 2).to(q.dtype)
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes; probabilities are computed anew from ``lse``."""
    query, key, value, dout, out = (_heads_first(x) for x in (q, k, v, dout, out))
    delta = (dout * out).sum(-1, keepdim=True)
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (query, key, value))
    for rows, visible in _blocks(q.shape[1], k.shape[1], tokens_per_frame, query_tokens):
        seen_key, seen_value = key[:, :, :visible], value[:, :, :visible]
        scores = scale * (query[:, :, rows] @ seen_key.mT)
        probabilities = torch.exp(scores - lse[:, :, rows, None])
        dscores = probabilities * (dout[:, :, rows] @ seen_value.mT - delta[:, :, rows])
        dquery[:, :, rows] = scale * (dscores @ seen_key)
        dkey[:, :, :visible] += scale * (dscores.mT @ query[:, :, rows])
        dvalue[:, :, :visible] += probabilities.mT @ dout[:, :, rows]
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dquery, dkey, dvalue))
    return dq, dk, dv


def _blocks(
    queries: int, keys: int, tokens_per_frame: int, query_tokens: int | None
) -> Iterator[tuple[slice, int]]:
    """Blocks of queries of one frame, and how many keys, the first ones, each of them sees."""
    step = tokens_per_frame if query_tokens is None else query_tokens
    for frame in range(0, queries, max(step, 1)):
        end = frame + step
        later = (queries - end) // step * tokens_per_frame
        for start in range(frame, end, QUERY_BLOCK):
            yield slice(start, min(start + QUERY_BLOCK, end)), keys - later


def _heads_first(x: Tensor) -> Tensor:
    """x (B, L, N, D) as (B, N, L, D) in accumulation precision."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).transpose(1, 2)
