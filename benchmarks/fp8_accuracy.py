"""How close fp8 attention comes to exact attention, and what its steps before coding are worth.

    python -m benchmarks.fp8_accuracy --tokens 2048

A row for each kind of inputs, (1, L, 2, 128) in bf16, with scores of deviation 1 (4 where sharp):
cosine similarity to attention in float64 and error relative to its norm, then that error where
keys are not centred, where nothing is rotated, and with neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast.kernels.fp8_attention import reference

HEADS, HEAD_DIM = 2, 128
Heads = tuple[Tensor, Tensor, Tensor]
# Size of every 25th feature of queries and keys, bias of keys and values, deviation of scores.
KINDS = {
    "features that stand out, 10 x, and biases": (10.0, 1.0, 1.0),
    "features that stand out, 4 x, and biases": (4.0, 1.0, 1.0),
    "biases": (1.0, 1.0, 1.0),
    "biases, sharp": (1.0, 1.0, 4.0),
    "features that stand out, 10 x, no biases": (10.0, 0.0, 1.0),
    "noise": (1.0, 0.0, 1.0),
    "noise, sharp": (1.0, 0.0, 4.0),
}


def draw(tokens: int, loudness: float, bias: float, generator: torch.Generator) -> Heads:
    """Queries, keys and values; the biases of keys that stand out are ten times as large again."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    loud = torch.ones(HEADS, HEAD_DIM)
    loud[:, ::25] = loudness
    key_bias = bias * normal(HEADS, HEAD_DIM) * loud * torch.where(loud > 1, 10.0, 1.0)
    q = normal(1, tokens, HEADS, HEAD_DIM) * loud
    k = normal(1, tokens, HEADS, HEAD_DIM) * loud + key_bias
    v = normal(1, tokens, HEADS, HEAD_DIM) + bias * normal(HEADS, HEAD_DIM)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def coded(heads: Heads, scale: float, *, centred: bool) -> Tensor:
    """Attention over codes in fp32, keys about their mean or as they are."""
    q, k, v = (x.float() for x in heads)
    known = reference.statistics(k, v, None)
    if not centred:
        known = known._replace(key_mean=torch.zeros_like(known.key_mean))
    codes = reference.quantize(q, k, v, None, scale, known)
    return reference.attend(codes, None, torch.empty_like(q))


@contextmanager
def without_rotation() -> Iterator[None]:
    """The reference as if features were rotated by a multiple of the identity."""
    rotate = reference.rotate
    reference.rotate = lambda x: x * reference.rotated(HEAD_DIM) ** 0.5
    try:
        yield
    finally:
        reference.rotate = rotate


def main() -> None:
    """Draw, attend in every way, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    titles = ("similarity", "error", "keys not centred", "not rotated", "neither")
    table = Table("inputs", *titles)
    for name, (loudness, bias, deviation) in KINDS.items():
        heads = draw(options.tokens, loudness, bias, torch.Generator().manual_seed(0))
        q, k, v = (x.double().transpose(1, 2) for x in heads)
        spread = (
            q.square().mean((0, 2)) * (k - k.mean(2, keepdim=True)).square().mean((0, 2))
        ).sum(-1)
        scale = deviation * float(spread.mean().rsqrt())
        exact = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

        def error(result: Tensor, exact: Tensor = exact) -> str:
            return f"{float((result - exact).norm() / exact.norm()):.2%}"

        best = coded(heads, scale, centred=True)
        similarity = F.cosine_similarity(best.double().flatten(), exact.flatten(), 0)
        others = [coded(heads, scale, centred=False)]
        with without_rotation():
            others += [coded(heads, scale, centred=centred) for centred in (True, False)]
        table.add_row(name, f"{float(similarity):.5f}", error(best), *map(error, others))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
