"""Attention over tokens that lie on several processes: by exchanged heads, and with a ring around.

After an exchange each process has some of the heads, for the tokens of all; attention is then that
of one process, over e4m3 codes and with a pattern too. A ring takes any number of processes, an
exchange as many as there are heads. Their product has the messages of a short ring, and exchanges
between neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.collectives import rank_in, size_of
from hunyuan_fast.distributed.shards import TokenShards
from hunyuan_fast.ops.attention_checks import check_kv_len_of_all, check_tensors
from hunyuan_fast.ops.fp8_attention import fp8_attention
from hunyuan_fast.ops.head_exchange import HeadExchange
from hunyuan_fast.ops.ring_attention import ring_attention
from hunyuan_fast.ops.rope3d_attention import attention
from hunyuan_fast.ops.sliding_tile_attention import SlidingTiles

_BY_HEADS = "let all processes of cp exchange heads, which keeps sequences whole: ulysses = cp"


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shards: TokenShards,
    kv_len: Tensor,
    scale: float | None = None,
    group: ProcessGroup | None,
    fp8: bool = False,
    pattern: SlidingTiles | None = None,
) -> Tensor:
    """Attention of the queries of this process over the valid keys of all, head by head.

    q, k, v: (B, L, N, D), the video and behind it the text of this process
    shards: which tokens lie where
    kv_len: (ranks, B), valid tokens of each process and sample: ``shards.kv_len``
    group: at most N processes; heads are dealt out in about equal parts
    fp8: over e4m3 codes, as ``fp8_attention``; inference only
    pattern: who sees whom, of all tokens and all N heads, as for ``attention``

    Returns (B, L, N, D), zero from the valid tokens on. Raises TypeError or ValueError where
    arguments do not fit.
    """
    given: dict[str, Any] = {"shards": shards, "kv_len": kv_len, "scale": scale}
    return usp_attention(q, k, v, **given, ulysses=group, ring=None, fp8=fp8, pattern=pattern)


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shards: TokenShards,
    kv_len: Tensor,
    scale: float | None = None,
    ulysses: ProcessGroup | None,
    ring: ProcessGroup | None,
    fp8: bool = False,
    pattern: SlidingTiles | None = None,
) -> Tensor:
    """The same with exchanges of heads inside, and rings across the groups that exchange.

    The processes are numbered ring index * size of ulysses + ulysses index; shards and kv_len are
    of all of them. With fp8 or a pattern there must be no ring.
    """
    check_tensors(q, k, v)
    together, rings = size_of(ulysses), size_of(ring)
    _check_shards(q, shards, kv_len, together * rings, rank_in(ring) * together + rank_in(ulysses))
    _check_valid(kv_len, shards, together)
    if ring is not None:
        check_ring("fp8" if fp8 else "same", pattern)
    if fp8 and pattern is not None:
        raise ValueError(f"pattern must be None with fp8, which has none, got {pattern}")
    options: dict[str, Any] = {"scale": scale, "fp8": fp8, "ring": ring}
    options["lengths"] = shards.merged(together).rows
    options["kv_len"] = kv_len.unflatten(0, (rings, together)).sum(1, dtype=torch.int32)
    if ulysses is None:
        return _attended(q, k, v, pattern=pattern, **options)
    exchange = HeadExchange.of(shards, q.shape[2], rank_in(ring), ulysses)
    if pattern is not None:
        pattern = pattern.of_heads(exchange.own_heads, q)
    heads = exchange.heads_for_tokens(torch.stack((q, k, v))).unbind(0)
    attended = _attended(*heads, pattern=pattern, **options)
    return exchange.tokens_for_heads(attended[None])[0]


@dataclass(frozen=True)
class SharedTokens:
    """Where the tokens of a joint sequence lie, for a context-parallel model on its way.

    It takes the place of the lengths (B,) that one process has.

    shards: the tokens of each process    kv_len: valid ones of each process and sample, (ranks, B)
    """

    shards: TokenShards
    kv_len: Tensor
    ulysses: ProcessGroup | None
    ring: ProcessGroup | None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        fp8: bool = False,
        pattern: SlidingTiles | None = None,
    ) -> Tensor:
        """Attention of the queries here over the keys of all processes."""
        return usp_attention(
            *(q, k, v),
            shards=self.shards,
            kv_len=self.kv_len,
            ulysses=self.ulysses,
            ring=self.ring,
            fp8=fp8,
            pattern=pattern,
        )


def check_ring(precision: str | None, pattern: object) -> None:
    """Raise ValueError for attention that there is not where tokens go round a ring.

    A rank sees the keys a part at a time there. Codes have no log-sum-exp to merge parts by, and
    patterns are of whole sequences. ``None`` is for no choice.
    """
    if precision not in (None, "same"):
        raise ValueError(
            "attention precision must be 'same' where tokens go round a ring (ulysses < cp), "
            f"got {precision!r}; {_BY_HEADS}"
        )
    if pattern is not None and pattern != "dense":
        raise ValueError(
            "attention must be 'dense', without windows, where tokens go round a ring "
            f"(ulysses < cp); {_BY_HEADS}"
        )


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    ring: ProcessGroup | None,
    fp8: bool,
    pattern: SlidingTiles | None,
) -> Tensor:
    """Attention of some heads; without a ring a process has the sequence of each of them."""
    if fp8:
        return fp8_attention(q, k, v, kv_len=kv_len[0], scale=scale)
    if pattern is not None:
        attended = attention(q, k, v, kv_len=kv_len[0], scale=scale, pattern=pattern)
    else:
        attended = ring_attention(q, k, v, kv_len=kv_len, lengths=lengths, scale=scale, group=ring)
    assert isinstance(attended, Tensor), "the log-sum-exp was not asked for"
    return attended


def _check_shards(q: Tensor, shards: TokenShards, kv_len: Tensor, ranks: int, rank: int) -> None:
    if len(shards.rows) != ranks:
        raise ValueError(f"shards must be of {ranks} processes, got {shards}")
    if shards.rows[rank] != q.shape[1]:
        raise ValueError(
            f"shards must have {q.shape[1]} rows for process {rank}, as q has, got {shards}"
        )
    check_kv_len_of_all(kv_len, q, rank, ranks)


def _check_valid(kv_len: Tensor, shards: TokenShards, together: int) -> None:
    """Valid tokens lie on the processes as all tokens do; those on a GPU are not looked at.

    Every process has the lengths of all, so that all refuse alike, before any of them waits for
    another. Groups of so many processes together have video first, then text: what is valid is the
    beginning of that.
    """
    if kv_len.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = kv_len.tolist()
    for rank, (own, rows) in enumerate(zip(lengths, shards.rows, strict=True)):
        if not all(0 <= length <= rows for length in own):
            raise ValueError(
                f"kv_len must lie in [0, {rows}] for process {rank}, the rows that shards has for "
                f"it, got {own}"
            )
    for first in range(0, len(lengths), together):
        group = slice(first, first + together)
        for sample, found in enumerate(zip(*lengths[group], strict=True)):
            wanted = _from_the_front(sum(found), shards.video[group], shards.text[group])
            if found != wanted:
                raise ValueError(
                    "kv_len must count valid video of all processes before any text, and text from "
                    f"the first process on, as shards.kv_len does: for {sum(found)} valid tokens "
                    f"of sample {sample} {wanted} on processes {first} to "
                    f"{first + together - 1}, got {found}"
                )


def _from_the_front(count: int, video: tuple[int, ...], text: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the first tokens each process has, of video of all and then text of all."""
    taken = []
    for size in (*video, *text):
        taken.append(min(size, count))
        count -= taken[-1]
    return tuple(map(sum, zip(taken[: len(video)], taken[len(video) :], strict=True)))
