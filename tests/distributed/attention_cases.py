"""Sequences of video and text cut over processes, and what one process makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.distributed.shards import TokenShards, part
from tests.kit.numerics import assert_as_good_as

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Sequence:
    """A joint sequence; not all of it divides by anything.

    video, text: tokens of both kinds    text_lens: valid text tokens of each sample
    """

    video: int
    text: int
    text_lens: tuple[int, ...]
    heads: int = 3
    head_dim: int = 8

    @property
    def length(self) -> int:
        """All tokens."""
        return self.video + self.text

    @property
    def text_len(self) -> Tensor:
        """Valid text tokens, (B,)."""
        return torch.tensor(self.text_lens, dtype=torch.int32)

    def draw(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, the same on every rank."""
        generator = torch.Generator().manual_seed(self.length)
        shape = (len(self.text_lens), self.length, self.heads, self.head_dim)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(4))


SEQUENCES = {
    "batch of different texts": Sequence(13, 6, (6, 0)),
    "image": Sequence(4, 5, (3, 5), heads=4),
    "an empty shard": Sequence(2, 1, (1, 0)),
    "nothing but video": Sequence(11, 1, (0, 0)),
}


def rows_of(shards: TokenShards, rank: int) -> list[int]:
    """Where the tokens of a rank stand in the whole sequence."""
    video = range(sum(shards.video))[part(shards.video, rank)]
    text = range(sum(shards.text))[part(shards.text, rank)]
    return [*video, *(sum(shards.video) + row for row in text)]


def one_process(sequence: Sequence, dtype: torch.dtype, compute: torch.dtype) -> dict[str, Tensor]:
    """Plain attention over everything: inputs of dtype, arithmetic in another."""
    *heads, dout = (x.to(compute) for x in sequence.draw(dtype))
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in heads)
    valid = torch.arange(sequence.length) < (sequence.video + sequence.text_len)[:, None]
    scores = (q @ k.mT * sequence.head_dim**-0.5).masked_fill(~valid[:, None, None], -torch.inf)
    out = scores.softmax(-1) @ v * valid[:, None, :, None]
    grads = torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))
    results = dict(zip(NAMES, (out.detach(), *grads), strict=True))
    return {name: x.transpose(1, 2) for name, x in results.items()}


def on_this_rank(
    sequence: Sequence,
    dtype: torch.dtype,
    shards: TokenShards,
    rank: int,
    attend: Callable[..., Tensor],
) -> dict[str, Tensor]:
    """The same of the tokens of a rank, by ``attend(q, k, v)``."""
    *heads, dout = (x[:, rows_of(shards, rank)] for x in sequence.draw(dtype))
    q, k, v = (x.clone().requires_grad_() for x in heads)
    out = attend(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def whole(found: list[dict[str, Tensor]], shards: TokenShards) -> dict[str, Tensor]:
    """What the ranks have, put together."""
    rows = torch.tensor([row for rank in range(len(found)) for row in rows_of(shards, rank)])
    back = rows.argsort()
    return {name: torch.cat([rank[name] for rank in found], 1)[:, back] for name in NAMES}


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over the output and all gradients."""
    return max(float((found[name].double() - wanted[name]).abs().max()) for name in NAMES)


def assert_as_one_process(found: dict[str, Tensor], sequence: Sequence, dtype: torch.dtype) -> None:
    """Within what the dtype allows: absolute in the wide ones, by the 2x rule in narrow ones."""
    exact = one_process(sequence, dtype, torch.float64)
    allowed: dict[Any, float] = {torch.float64: 1e-10, torch.float32: 1e-5}
    if dtype in allowed:
        assert largest_difference(found, exact) <= allowed[dtype]
        return
    plain = one_process(sequence, dtype, dtype)
    for name in NAMES:
        assert_as_good_as(found[name], exact[name], plain[name], name=name)
