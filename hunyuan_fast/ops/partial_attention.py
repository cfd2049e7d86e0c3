"""Attention of queries over the keys of other tokens, in plain PyTorch."""

import torch
from torch import Tensor


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, scale: float, q_len: Tensor
) -> tuple[Tensor, Tensor]:
    """out (B, Lq, N, D) and lse (B, N, Lq): 0 and -inf in rows from q_len on."""
    _, _, value, scores, _ = _parts(q, k, v, kv_len, scale, q_len)
    lse = scores.logsumexp(-1)
    out = _exp(scores, lse) @ value
    return out.transpose(1, 2).to(q.dtype), lse


def partial_attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor,
    scale: float,
    q_len: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of these keys in the gradients, given out and lse over all keys."""
    query, key, value, scores, rows = _parts(q, k, v, kv_len, scale, q_len)
    dout, out = (_heads_first(x, rows) for x in (dout, out))
    probabilities = _exp(scores, lse)
    dscores = probabilities * (dout @ value.mT - (dout * out).sum(-1, keepdim=True))
    found = scale * dscores @ key, scale * dscores.mT @ query, probabilities.mT @ dout
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype) for x in found)
    return dq, dk, dv


def _parts(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, scale: float, q_len: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, keys = (
        torch.arange(x.shape[1], device=x.device) < n[:, None] for x, n in ((q, q_len), (k, kv_len))
    )
    query, key, value = _heads_first(q, rows), _heads_first(k, keys), _heads_first(v, keys)
    pairs = (rows[:, :, None] & keys[:, None])[:, None]
    scores = (scale * query @ key.mT).masked_fill(~pairs, -torch.inf)
    return query, key, value, scores, rows


def _heads_first(x: Tensor, taken: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.masked_fill(~taken[..., None, None], 0).transpose(1, 2)


def _exp(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
