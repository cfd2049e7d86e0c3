"""Attention over tokens that lie on several processes: by exchanged heads, and with a ring around.

After an exchange each process has some of the heads, for the tokens of all; attention is then that
of one process. A ring takes any number of processes, an exchange as many as there are heads. Their
product has the messages of a short ring, and exchanges between neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.collectives import all_to_all, rank_in, size_of
from hunyuan_fast.distributed.shards import TokenShards, split_sizes
from hunyuan_fast.ops.attention_checks import check_kv_len_of_all, check_tensors
from hunyuan_fast.ops.ring_attention import ring_attention


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shards: TokenShards,
    kv_len: Tensor,
    scale: float | None = None,
    group: ProcessGroup | None,
) -> Tensor:
    """Attention of the queries of this process over the valid keys of all, head by head.

    q, k, v: (B, L, N, D), the video and behind it the text of this process
    shards: which tokens lie where
    kv_len: (ranks, B), valid tokens of each process and sample: ``shards.kv_len``
    group: at most N processes; heads are dealt out in about equal parts

    Returns (B, L, N, D), zero from the valid tokens on. Raises TypeError or ValueError where
    arguments do not fit.
    """
    return usp_attention(
        q, k, v, shards=shards, kv_len=kv_len, scale=scale, ulysses=group, ring=None
    )


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
) -> Tensor:
    """The same with exchanges of heads inside, and rings across the groups that exchange.

    The processes are numbered ring index * size of ulysses + ulysses index; shards and kv_len are
    of all of them.
    """
    check_tensors(q, k, v)
    together, rings = size_of(ulysses), size_of(ring)
    _check_shards(q, shards, kv_len, together * rings, rank_in(ring) * together + rank_in(ulysses))
    _check_valid(kv_len, shards, together)
    around = shards.merged(together)
    valid = kv_len.unflatten(0, (rings, together)).sum(1, dtype=torch.int32)
    if ulysses is None:
        attended = ring_attention(
            q, k, v, kv_len=valid, lengths=around.rows, scale=scale, group=ring
        )
        assert isinstance(attended, Tensor), "the log-sum-exp was not asked for"
        return attended
    exchange = _Exchange.of(shards, q.shape[2], rank_in(ring), ulysses)
    heads = exchange.heads_for_tokens(torch.stack((q, k, v))).unbind(0)
    attended = ring_attention(*heads, kv_len=valid, lengths=around.rows, scale=scale, group=ring)
    assert isinstance(attended, Tensor), "the log-sum-exp was not asked for"
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the queries here over the keys of all processes."""
        return usp_attention(
            *(q, k, v),
            shards=self.shards,
            kv_len=self.kv_len,
            ulysses=self.ulysses,
            ring=self.ring,
        )


@dataclass(frozen=True)
class _Exchange:
    """Who gets what when some processes exchange heads for tokens.

    shards: of these processes    heads: how many each one gets    rank: of this process
    """

    shards: TokenShards
    heads: tuple[int, ...]
    rank: int
    group: ProcessGroup

    @classmethod
    def of(
        cls, shards: TokenShards, num_heads: int, ring_rank: int, group: ProcessGroup
    ) -> _Exchange:
        """That of the processes of ``group``, among all whose shards are given."""
        ranks = group.size()
        if ranks > num_heads:
            raise ValueError(
                f"ulysses must have at most as many processes as q has heads, {num_heads}, "
                f"got {ranks}; let a ring be the rest"
            )
        here = slice(ring_rank * ranks, (ring_rank + 1) * ranks)
        mine = replace(shards, video=shards.video[here], text=shards.text[here])
        return cls(mine, split_sizes(num_heads, ranks), group.rank(), group)

    def heads_for_tokens(self, x: Tensor) -> Tensor:
        """From all heads of the tokens here, (K, B, L, N, D), to some heads of the tokens of all.

        Video of all comes before text of all, so that valid rows are a prefix.
        """
        count, batch, _, _, dim = x.shape
        own = self.heads[self.rank]
        parts = x.split(self.heads, 3)
        shapes = [(count, batch, rows, own, dim) for rows in self.shards.rows]
        received = all_to_all(parts, shapes, self.group)
        pairs = zip(received, self.shards.video, strict=True)
        video, text = zip(*(rows.tensor_split((length,), 2) for rows, length in pairs), strict=True)
        return torch.cat((*video, *text), 2)

    def tokens_for_heads(self, x: Tensor) -> Tensor:
        """Back: from some heads of the tokens of all to all heads of the tokens here."""
        count, batch, _, _, dim = x.shape
        videos, texts = self.shards.video, self.shards.text
        cut = x.split((*videos, *texts), 2)
        pairs = zip(cut[: len(videos)], cut[len(videos) :], strict=True)
        parts = [torch.cat(pair, 2) for pair in pairs]
        rows = self.shards.rows[self.rank]
        shapes = [(count, batch, rows, heads, dim) for heads in self.heads]
        return torch.cat(all_to_all(parts, shapes, self.group), 3)


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
