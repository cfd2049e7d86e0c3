"""Sliding-tile attention by torch's CPU flash kernel, one call for all tiles that see the same.

Tiles at a border see what their neighbours further in see, so they share a call; heads of one
window share it too. Queries and keys of a call are gathered, in raster order, which costs little
beside the products. The tokens of a text see everything: one call for all heads. Gradients of keys
and values are sums over calls, added up in fp32; the kernel rounds the share of each.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from hunyuan_fast.kernels.sliding_tile_attention.reference import accumulate
from hunyuan_fast.kernels.sliding_tile_attention.windows import Box, Sizes, boxes, tiles

VERIFIED_ON = frozenset({"cpu"})

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Raster indices of the queries of a call, and of the keys that they see.
_Call = tuple[Tensor, Tensor]


def supports(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    """``None`` when torch's CPU kernel can be used, else the reason."""
    if q.device.type != "cpu":
        return f"torch's flash kernel for the CPU is used, got {q.device.type}"
    if q.numel() == 0:
        return f"the tensors are empty, got q of shape {tuple(q.shape)}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the features of q, k and v must be adjacent in memory"
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
    batch, length = q.shape[:2]
    out = q.new_empty(q.shape) if out is None else out
    lse = _sums_like(q)
    for items, valid in _prefixes(kv_len, batch, length):
        for heads, window in _shared(windows):
            query, key, value = (_part(x, items, heads, valid) for x in (q, k, v))
            result, sums = query.new_empty(query.shape), _sums_like(query)
            for own, seen in _calls(grid, tile, window, valid):
                rows = (_take(query, own), _take(key, seen), _take(value, seen))
                found, sums[:, :, own] = _flash(*rows, scale=scale)
                result.index_copy_(1, own, found.transpose(1, 2))
            out[items, :valid, heads] = result
            lse[items, heads, :valid] = sums
        out[items, valid:] = 0
        lse[items, :, valid:] = -torch.inf
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
    """Gradients of q, k and v, each (B, L, N, D)."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for items, valid in _prefixes(kv_len, q.shape[0], q.shape[1]):
        for heads, window in _shared(windows):
            of_queries = [_part(x, items, heads, valid) for x in (dout, q, out)]
            of_keys = [_part(x, items, heads, valid) for x in (k, v)]
            log_sums = lse[items, heads, :valid]
            dquery = of_keys[0].new_empty(of_keys[0].shape)
            sums = [x.new_zeros(x.shape, dtype=accumulate(x.dtype)) for x in of_keys]
            for own, seen in _calls(grid, tile, window, valid):
                douts, queries, outs = (_take(x, own) for x in of_queries)
                keys, values = (_take(x, seen) for x in of_keys)
                given = douts, queries, keys, values, outs, log_sums[:, :, own]
                found, *shares = _flash_backward(*given, 0.0, False, scale=scale)
                dquery.index_copy_(1, own, found.transpose(1, 2))
                for total, share in zip(sums, shares, strict=True):
                    total.index_add_(1, seen, share.transpose(1, 2).to(total.dtype))
            for gradient, part in zip((dq, dk, dv), (dquery, *sums), strict=True):
                gradient[items, :valid, heads] = part.to(gradient.dtype)
    return dq, dk, dv


def _prefixes(kv_len: Tensor | None, batch: int, length: int) -> list[tuple[slice, int]]:
    """Slices of the batch and the number of valid tokens that each of them shares."""
    lengths = [length] * batch if kv_len is None else kv_len.tolist()
    found: list[tuple[slice, int]] = []
    first = 0
    for valid, run in groupby(lengths):
        after = first + len(list(run))
        found.append((slice(first, after), valid))
        first = after
    return found


def _shared(windows: Tensor) -> Iterator[tuple[slice | list[int], Sizes]]:
    """Heads of one window, as a slice where all heads have the same."""
    each = [(t, h, w) for t, h, w in windows.tolist()]
    if len(set(each)) == 1:
        yield slice(None), each[0]
        return
    for window in dict.fromkeys(each):
        yield [head for head, own in enumerate(each) if own == window], window


@lru_cache(maxsize=32)
def _calls(grid: Sizes, tile: Sizes, window: Sizes, valid: int) -> list[_Call]:
    """Who asks, and whom they see, of the first ``valid`` tokens; every token asks once."""
    everything = torch.arange(valid, device="cpu")
    video = math.prod(grid)
    if all(size >= count for size, count in zip(window, tiles(grid, tile), strict=True)):
        return [(everything, everything)] if valid else []
    raster, text = torch.arange(video, device="cpu").view(grid), everything[video:]
    found = []
    for own, seen in boxes(grid, tile, window):
        queries, keys = (_rows(raster, box, valid) for box in (own, seen))
        if len(queries):
            found.append((queries, torch.cat((keys, text))))
    return [*found, (text, everything)] if len(text) else found


def _rows(raster: Tensor, box: Box, valid: int) -> Tensor:
    """The valid tokens of a box, rising."""
    t, h, w = (slice(axis.start, axis.stop) for axis in box)
    rows = raster[t, h, w].flatten()
    return rows[rows < valid]


def _part(x: Tensor, items: slice, heads: slice | list[int], valid: int) -> Tensor:
    """The valid tokens of some samples and heads of x (B, L, N, D); all heads are a view."""
    return x[items, :valid][:, :, heads]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, L, N, D), heads first as the kernel wants them; no copy where they are all."""
    rows = x if len(index) == x.shape[1] else x.index_select(1, index)
    return rows.transpose(1, 2)


def _sums_like(x: Tensor) -> Tensor:
    """Room for the log-sum-exp of x (B, L, N, D): (B, N, L)."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=accumulate(x.dtype))
