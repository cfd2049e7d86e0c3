"""Attention over e4m3 codes in plain PyTorch: what every kernel of the room has to compute.

Scores exist for ``ROWS`` queries and one block of keys at a time, so memory grows with L and not
with its square. Nothing here asks the device for a value: prefixes are handled by comparing
positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})
INFERENCE_ONLY = True

CODE = torch.float8_e4m3fn
LARGEST = 448.0
# Tokens that share a scale, queries and keys; lengths are padded to whole blocks of keys.
QUERY_BLOCK = 64
KEY_BLOCK = 128
# Tokens within which values are permuted.
GROUP = 16
# Probabilities are coded as 256 p: a power of two, so that nothing is rounded but the code.
TOP_LOG2 = 8
# The least peak of a block, and the least scale: the product of two is still a normal number.
LEAST_PEAK = 2.0**-50
LEAST_SCALE = 2.0**-60
KEY_FACTOR = 1 / LARGEST
LOG2_E = 1.4426950408889634
# Queries that the reference takes at a time.
ROWS = 512


class Statistics(NamedTuple):
    """What is known of all valid tokens of a head before any is coded; fp32, (B, N, D) each."""

    key_mean: Tensor
    value_mean: Tensor
    value_peak: Tensor


class Codes(NamedTuple):
    """Coded queries, keys and values, contiguous; scales and means are fp32.

    Lp is ``padded_length(L)``.
    """

    q: Tensor  # (B, N, Lp, D)
    q_scale: Tensor  # (B, N, Lp / QUERY_BLOCK)
    k: Tensor  # (B, N, Lp, D)
    k_scale: Tensor  # (B, N, Lp / KEY_BLOCK)
    v: Tensor  # (B, N, D, Lp), tokens at their `position`
    v_scale: Tensor  # (B, N, D)
    v_mean: Tensor  # (B, N, D)


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, None, float]:
    """Arguments of a typical call."""
    q, k, v = (torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    return q, k, v, None, 128**-0.5


def supports(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention (B, L, N, D), written into ``out`` if given."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    codes = quantize(q, k, v, kv_len, scale, statistics(k, v, kv_len))
    return attend(codes, kv_len, out)


def padded_length(length: int) -> int:
    """The length of coded sequences: whole blocks of keys."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK


def token_at(position: Tensor) -> Tensor:
    """The token whose value stands at a position; within groups of 16, for each group the same.

    A warpgroup holds the scores of a row in quads of threads: of each eight tokens, thread t has
    2t and 2t + 1. As the left operand of the next product, in eight bits, it must have positions
    4t to 4t + 3 of each sixteen. So those four positions belong to tokens 2t, 2t + 1, 8 + 2t and
    9 + 2t, and probabilities become an operand where they are, without moving between threads.
    """
    t, i = position % GROUP // 4, position % 4
    return position // GROUP * GROUP + 8 * (i // 2) + 2 * t + i % 2


def rotated(head_dim: int) -> int:
    """P, how many features a rotation mixes: the largest power of two that divides D."""
    return head_dim & -head_dim


def query_factor(scale: float, head_dim: int) -> float:
    """What makes a scale of queries from a peak: log2(e) in it, P, by which scores grew, out."""
    return scale * LOG2_E / (LARGEST * rotated(head_dim))


def rotate(x: Tensor) -> Tensor:
    """Products of x (..., D) fp32 with a Hadamard matrix, not normalised: |rotate(x)|^2 = P |x|^2.

    In groups of P features, one butterfly after the other, from neighbours to halves: in this order
    every implementation gets the same bits.
    """
    size = rotated(x.shape[-1])
    step = 1
    while step < size:
        first, second = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        step *= 2
    return x


def statistics(k: Tensor, v: Tensor, kv_len: Tensor | None) -> Statistics:
    """Means of keys and values, and the largest distance of a value from its mean."""
    valid = _valid_rows(k, kv_len)
    count = torch.full((k.shape[0],), k.shape[1], device=k.device) if kv_len is None else kv_len
    count = count.clamp_min(1)[:, None, None]
    key_mean, value_mean = (_heads_first(x, valid).sum(2) / count for x in (k, v))
    value = v.float() - value_mean[:, None]
    peak = _heads_first(value.abs(), valid).amax(2) if v.shape[1] else torch.zeros_like(value_mean)
    return Statistics(key_mean, value_mean, peak.clamp_min(LEAST_PEAK))


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    known: Statistics,
) -> Codes:
    """The codes of q, of k and v about their means; zeros past ``kv_len``."""
    valid = _valid_rows(q, kv_len)
    queries = _padded(rotate(_heads_first(q, valid)))
    keys = _padded(rotate(_heads_first(k.float() - known.key_mean[:, None], valid)))
    values = _padded(_heads_first(v.float() - known.value_mean[:, None], valid))

    q_peak, k_peak = _peaks(queries, QUERY_BLOCK), _peaks(keys, KEY_BLOCK)
    order = token_at(torch.arange(values.shape[2], device=v.device))
    return Codes(
        q=_code(queries, q_peak.repeat_interleave(QUERY_BLOCK, 2)[..., None]),
        q_scale=(q_peak * query_factor(scale, q.shape[-1])).clamp_min(LEAST_SCALE),
        k=_code(keys, k_peak.repeat_interleave(KEY_BLOCK, 2)[..., None]),
        k_scale=k_peak * KEY_FACTOR,
        v=_code(values[:, :, order].mT, known.value_peak[..., None]),
        v_scale=known.value_peak * KEY_FACTOR,
        v_mean=known.value_mean,
    )


def attend(codes: Codes, kv_len: Tensor | None, out: Tensor) -> Tensor:
    """Attention over codes, written into ``out`` (B, L, N, D), which it returns."""
    batch, length = out.shape[:2]
    order = token_at(torch.arange(codes.v.shape[-1], device=out.device))
    values = codes.v[..., order.argsort()]  # by token again
    q_scale = codes.q_scale.repeat_interleave(QUERY_BLOCK, 2)[..., None]
    if kv_len is None:
        kv_len = torch.full((batch,), length, device=out.device)

    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        query, c = codes.q[:, :, rows].float(), q_scale[:, :, rows]
        highest = torch.full((*query.shape[:3], 1), -torch.inf, device=out.device)
        total = torch.zeros_like(highest)
        sums = torch.zeros_like(query)
        for block in range(codes.k_scale.shape[2]):
            tokens = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
            key, value = codes.k[:, :, tokens].float(), values[..., tokens].float()
            scores = (query @ key.mT) * (c * codes.k_scale[:, :, block, None, None])
            position = torch.arange(tokens.start, tokens.stop, device=out.device)
            seen = position < kv_len[:, None, None, None]
            scores = torch.where(seen, scores, -torch.inf)

            higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
            p = torch.exp2(scores - (higher - TOP_LOG2))
            correction = torch.exp2(highest - higher)
            total = total * correction + p.sum(-1, keepdim=True)
            sums = sums * correction + p.to(CODE).float() @ value.mT
            highest = higher
        result = sums / total * codes.v_scale[:, :, None] + codes.v_mean[:, :, None]
        valid = torch.arange(rows.start, rows.stop, device=out.device) < kv_len[:, None]
        # Selected, not multiplied: a row without a single key is NaN here.
        result = torch.where(valid[:, None, :, None], result, 0.0)
        out[:, rows] = result.transpose(1, 2).to(out.dtype)
    return out


def _valid_rows(x: Tensor, kv_len: Tensor | None) -> Tensor | None:
    """Which tokens take part: (B, L), or ``None`` when all do."""
    if kv_len is None:
        return None
    return torch.arange(x.shape[1], device=x.device) < kv_len[:, None]


def _heads_first(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, L, N, D) as (B, N, L, D) in fp32, with zeros in place of padding."""
    x = x.float()
    if valid is not None:
        # Selected, not multiplied: padding may hold NaN.
        x = torch.where(valid[:, :, None, None], x, 0.0)
    return x.transpose(1, 2)


def _padded(x: Tensor) -> Tensor:
    """x (B, N, L, D) with zeros up to whole blocks of keys."""
    return torch.nn.functional.pad(x, (0, 0, 0, padded_length(x.shape[2]) - x.shape[2]))


def _peaks(x: Tensor, block: int) -> Tensor:
    """The largest magnitude in each block of tokens of x (B, N, Lp, D)."""
    return x.unflatten(2, (-1, block)).abs().amax((3, 4)).clamp_min(LEAST_PEAK)


def _code(x: Tensor, peak: Tensor) -> Tensor:
    """x / peak, with the peak at the end of the range; one division, one product, one rounding.

    No value is above its peak, so none leaves the range by more than a rounding takes back.
    """
    return (x * (LARGEST / peak)).to(CODE, memory_format=torch.contiguous_format)
