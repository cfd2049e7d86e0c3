"""Attention over each sample's valid prefix, forward and backward, in plain PyTorch.

Scores exist for ``QUERY_BLOCK`` queries at a time, so memory grows with L and not with its square.
Nothing here asks the device for a value: prefixes are handled by comparing positions.
"""

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})
QUERY_BLOCK = 512


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, None, float]:
    """Arguments of a typical call."""
    q, k, v = (torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    return q, k, v, None, 128**-0.5


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


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
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    queries, keys = _taking_part(q, k, kv_len, q_len)
    query, key, value = _heads_first(q, queries), _heads_first(k, keys), _heads_first(v, keys)
    lse = torch.empty(query.shape[:-1], dtype=query.dtype, device=q.device)

    for rows in _blocks(q.shape[1]):
        scores = _scores(query[:, :, rows], key, queries, keys, rows, scale)
        lse[:, :, rows] = scores.logsumexp(-1)
        probabilities = _probabilities(scores, lse[:, :, rows])
        out[:, rows] = (probabilities @ value).transpose(1, 2).to(out.dtype)
    return out, lse


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
    """Gradients like q, k and v; the probabilities are computed anew from ``lse``."""
    queries, keys = _taking_part(q, k, kv_len, q_len)
    query, dout, out = (_heads_first(x, queries) for x in (q, dout, out))
    key, value = (_heads_first(x, keys) for x in (k, v))
    delta = (dout * out).sum(-1, keepdim=True)
    if queries is not None:
        lse = lse.masked_fill(~queries[:, None], -torch.inf)
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (query, key, value))

    for rows in _blocks(q.shape[1]):
        scores = _scores(query[:, :, rows], key, queries, keys, rows, scale)
        probabilities = _probabilities(scores, lse[:, :, rows])
        dscores = probabilities * (dout[:, :, rows] @ value.mT - delta[:, :, rows])
        dquery[:, :, rows] = scale * (dscores @ key)
        dkey += scale * (dscores.mT @ query[:, :, rows])
        dvalue += probabilities.mT @ dout[:, :, rows]
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dquery, dkey, dvalue))
    return dq, dk, dv


def apply_rope3d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs of the first ``len(cos)`` tokens of x (B, L, N, D), copy the others.

    cos, sin: (num_video_tokens, D), of which the even features are read: a pair shares one angle.
    """
    num_video_tokens = cos.shape[0]
    cos, sin = (table[:, None, 0::2].to(_accumulate(x.dtype)) for table in (cos, sin))
    # A copy, because complex numbers must start at even addresses. One complex product per pair
    # takes less than half the time of separate real ones on a CPU.
    video = x[:, :num_video_tokens]
    video = video.to(cos.dtype, copy=True, memory_format=torch.contiguous_format)
    rotated = torch.view_as_complex(video.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    rotated = torch.view_as_real(rotated).flatten(-2).to(x.dtype)
    if num_video_tokens == x.shape[1]:
        return rotated
    return torch.cat((rotated, x[:, num_video_tokens:]), dim=1)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(length: int) -> list[slice]:
    return [slice(start, start + QUERY_BLOCK) for start in range(0, length, QUERY_BLOCK)]


def _taking_part(
    q: Tensor, k: Tensor, kv_len: Tensor | None, q_len: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which queries (B, Lq) and which keys (B, Lk) take part, ``None`` when all do."""
    keys = _valid_rows(k, kv_len)
    return (keys if q_len is None else _valid_rows(q, q_len)), keys


def _valid_rows(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    if lengths is None:
        return None
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def _heads_first(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, L, N, D) as (B, N, L, D) in accumulation precision, with zeros in place of padding."""
    x = x.to(_accumulate(x.dtype))
    if valid is not None:
        # Selected, not multiplied: padding may hold NaN.
        x = torch.where(valid[:, :, None, None], x, 0.0)
    return x.transpose(1, 2)


def _scores(
    query: Tensor,
    key: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    rows: slice,
    scale: float,
) -> Tensor:
    """Scaled scores (B, N, rows, Lk), -inf wherever the query or the key is padding."""
    scores = scale * (query @ key.mT)
    if queries is not None:
        pairs = queries[:, rows, None]
        if keys is not None:
            pairs = pairs & keys[:, None, :]
        scores = scores.masked_fill(~pairs[:, None], -torch.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 in rows without a single key, where lse is -inf."""
    lse = lse[..., None]
    return torch.where(lse == -torch.inf, 0.0, torch.exp(scores - lse))
