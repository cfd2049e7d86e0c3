"""Heads for tokens: how processes that share a sequence get some heads of all of it, and back.

Two operators, each of which is the gradient of the other: they move numbers and change none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.collectives import all_to_all_parts, group_named
from hunyuan_fast.distributed.shards import TokenShards, part, split_sizes
from hunyuan_fast.ops.operator import define


@dataclass(frozen=True)
class HeadExchange:
    """Who gets what when some processes exchange heads for tokens.

    shards: of these processes    heads: how many each one gets
    """

    shards: TokenShards
    heads: tuple[int, ...]
    group: ProcessGroup

    @classmethod
    def of(
        cls, shards: TokenShards, num_heads: int, ring_rank: int, group: ProcessGroup
    ) -> HeadExchange:
        """That of the processes of ``group``, among all whose shards are given."""
        ranks = group.size()
        if ranks > num_heads:
            raise ValueError(
                f"ulysses must have at most as many processes as q has heads, {num_heads}, "
                f"got {ranks}; let a ring be the rest"
            )
        here = slice(ring_rank * ranks, (ring_rank + 1) * ranks)
        mine = TokenShards(shards.video[here], shards.text[here])
        return cls(mine, split_sizes(num_heads, ranks), group)

    @property
    def own_heads(self) -> slice:
        """Those of all heads that this process gets."""
        return part(self.heads, self.group.rank())

    def heads_for_tokens(self, x: Tensor) -> Tensor:
        """From all heads of the tokens here, (K, B, L, N, D), to some heads of the tokens of all.

        Video of all comes before text of all, so that valid rows are a prefix.
        """
        return _heads_for_tokens(x, *self._taken)

    def tokens_for_heads(self, x: Tensor) -> Tensor:
        """Back: from some heads of the tokens of all to all heads of the tokens here."""
        return _tokens_for_heads(x, *self._taken)

    @property
    def _taken(self) -> tuple[Any, ...]:
        return self.shards.video, self.shards.text, self.heads, self.group.group_name


def _heads_for_tokens_kernel(
    x: Tensor, video: Sequence[int], text: Sequence[int], heads: Sequence[int], name: str
) -> Tensor:
    group = group_named(name)
    count, batch, _, _, dim = x.shape
    own = heads[group.rank()]
    parts = x.split(list(heads), 3)
    shapes = [(count, batch, v + t, own, dim) for v, t in zip(video, text, strict=True)]
    received = all_to_all_parts(parts, shapes, group)
    pairs = [rows.tensor_split((v,), 2) for rows, v in zip(received, video, strict=True)]
    videos, texts = zip(*pairs, strict=True)
    return torch.cat((*videos, *texts), 2)


def _fake_heads_for_tokens(
    x: Tensor, video: Sequence[int], text: Sequence[int], heads: Sequence[int], name: str
) -> Tensor:
    count, batch, _, _, dim = x.shape
    own = heads[group_named(name).rank()]
    return x.new_empty((count, batch, sum(video) + sum(text), own, dim))


def _tokens_for_heads_kernel(
    x: Tensor, video: Sequence[int], text: Sequence[int], heads: Sequence[int], name: str
) -> Tensor:
    group = group_named(name)
    count, batch, _, _, dim = x.shape
    rank, ranks = group.rank(), len(video)
    cut = x.split([*video, *text], 2)
    pairs = zip(cut[:ranks], cut[ranks:], strict=True)
    parts = [torch.cat(pair, 2) for pair in pairs]
    shapes = [(count, batch, video[rank] + text[rank], some, dim) for some in heads]
    return torch.cat(all_to_all_parts(parts, shapes, group), 3)


def _fake_tokens_for_heads(
    x: Tensor, video: Sequence[int], text: Sequence[int], heads: Sequence[int], name: str
) -> Tensor:
    count, batch, _, _, dim = x.shape
    rank = group_named(name).rank()
    return x.new_empty((count, batch, video[rank] + text[rank], sum(heads), dim))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, video, text, heads, name = inputs
    ctx.taken = tuple(video), tuple(text), tuple(heads), name


def _heads_for_tokens_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _tokens_for_heads(grad, *ctx.taken), None, None, None, None


def _tokens_for_heads_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _heads_for_tokens(grad, *ctx.taken), None, None, None, None


_ARGUMENTS = "Tensor x, SymInt[] video, SymInt[] text, SymInt[] heads, str group"
_heads_for_tokens = define(
    f"heads_for_tokens({_ARGUMENTS}) -> Tensor",
    _heads_for_tokens_kernel,
    _fake_heads_for_tokens,
    save=_save,
    gradients=_heads_for_tokens_gradients,
)
_tokens_for_heads = define(
    f"tokens_for_heads({_ARGUMENTS}) -> Tensor",
    _tokens_for_heads_kernel,
    _fake_tokens_for_heads,
    save=_save,
    gradients=_tokens_for_heads_gradients,
)
