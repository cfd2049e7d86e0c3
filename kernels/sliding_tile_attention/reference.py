"""Sliding-tile attention in plain PyTorch: who sees whom is decided token by token.

Scores exist for ``QUERY_BLOCK`` queries at a time, so memory grows with L and not with its square.
Nothing here asks the device for a value.
"""

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})
QUERY_BLOCK = 512

Sizes = tuple[int, int, int]
Example = tuple[Tensor, Tensor, Tensor, Tensor, Sizes, Sizes, None, float]


def example(device: torch.device) -> Example:
    """Arguments of a typical call: 256 video tokens and 64 of text, two heads."""
    q, k, v = (torch.zeros(1, 320, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    windows = torch.tensor([[1, 1, 1], [1, 3, 3]], dtype=torch.int32, device=device)
    return q, k, v, windows, (4, 8, 8), (2, 2, 2), None, 128**-0.5


def supports(q: Tensor, *_: object) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


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
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    valid = _valid_rows(q, kv_len)
    query, key, value = (_heads_first(x, valid) for x in (q, k, v))
    lse = torch.empty(query.shape[:-1], dtype=query.dtype, device=q.device)
    for rows in _blocks(q.shape[1]):
        seen = _seen(rows, q.shape[1], windows, grid, tile, valid)
        scores = (scale * (query[:, :, rows] @ key.mT)).masked_fill(~seen, -torch.inf)
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
    windows: Tensor,
    grid: Sizes,
    tile: Sizes,
    kv_len: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each (B, L, N, D); the probabilities are computed anew from ``lse``."""
    valid = _valid_rows(q, kv_len)
    query, key, value, dout, out = (_heads_first(x, valid) for x in (q, k, v, dout, out))
    delta = (dout * out).sum(-1, keepdim=True)
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (query, key, value))
    for rows in _blocks(q.shape[1]):
        seen = _seen(rows, q.shape[1], windows, grid, tile, valid)
        scores = (scale * (query[:, :, rows] @ key.mT)).masked_fill(~seen, -torch.inf)
        probabilities = _probabilities(scores, lse[:, :, rows])
        dscores = probabilities * (dout[:, :, rows] @ value.mT - delta[:, :, rows])
        dquery[:, :, rows] = scale * (dscores @ key)
        dkey += scale * (dscores.mT @ query[:, :, rows])
        dvalue += probabilities.mT @ dout[:, :, rows]
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dquery, dkey, dvalue))
    return dq, dk, dv


def _seen(
    rows: slice, length: int, windows: Tensor, grid: Sizes, tile: Sizes, valid: Tensor | None
) -> Tensor:
    """Which keys the queries ``rows`` see: (B or 1, N, rows, L)."""
    tokens = torch.arange(length, device=windows.device)
    num_video = grid[0] * grid[1] * grid[2]
    # Positions along T, H and W; text tokens get some too, which do not count.
    positions = tokens // (grid[1] * grid[2]), tokens // grid[2] % grid[1], tokens % grid[2]
    near = torch.ones((), dtype=torch.bool, device=windows.device)
    for axis, position in enumerate(positions):
        count = -(-grid[axis] // tile[axis])
        tiles = position // tile[axis]
        window = windows[:, axis, None].clamp(1, count)  # (N, 1)
        first = (tiles[rows] - window // 2).clamp(min=0).minimum(count - window)  # (N, rows)
        inside = (tiles >= first[..., None]) & (tiles < (first + window)[..., None])
        near = near & inside  # (N, rows, L)
    text = tokens >= num_video
    seen = (near | text[rows, None] | text)[None]
    if valid is None:
        return seen
    return seen & valid[:, None, rows, None] & valid[:, None, None, :]


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(length: int) -> list[slice]:
    return [
        slice(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)
    ]


def _valid_rows(q: Tensor, kv_len: Tensor | None) -> Tensor | None:
    """Which tokens take part: (B, L), or ``None`` when all do."""
    if kv_len is None:
        return None
    return torch.arange(q.shape[1], device=q.device) < kv_len[:, None]


def _heads_first(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, L, N, D) as (B, N, L, D) in accumulation precision, with zeros in place of padding."""
    x = x.to(accumulate(x.dtype))
    if valid is not None:
        # Selected, not multiplied: padding may hold NaN.
        x = torch.where(valid[:, :, None, None], x, 0.0)
    return x.transpose(1, 2)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 in rows without a single key, where lse is -inf."""
    lse = lse[..., None]
    return torch.where(lse == -torch.inf, 0.0, torch.exp(scores - lse))
