"""Cutting a pass into horizontal strips: which rows go through which layer.

A strip is read with rows beyond those that are wanted at the end. Convolutions repeat the edge of
what they see, which spoils a row at each false border, so that fewer and fewer of the rows that
came are right, until those are left that are wanted. Spoilt rows are cut off where the number of
rows changes, that they do not multiply, and at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hunyuan_fast.models.vae.layers import Layer, Rows


@dataclass(frozen=True)
class Course:
    """The way of one strip through a chain of layers.

    came: rows of every point of the chain that are there, the spoilt ones among them; used: rows
    of them that go on, into the next layer, or at the end as the result.
    """

    came: tuple[Rows, ...]
    used: tuple[Rows, ...]

    def cut(self, place: int) -> slice | None:
        """Which of the rows at a point of the chain go on; None for all of them."""
        came, used = self.came[place], self.used[place]
        return None if came == used else slice(used[0] - came[0], used[1] - came[0])


def strips(height: int, count: int) -> list[Rows]:
    """All rows in `count` strips, as even as they can be."""
    ends = [height * n // count for n in range(count + 1)]
    return list(pairwise(ends))


def course(layers: Sequence[Layer], heights: Sequence[int], rows: Rows) -> Course:
    """How rows of the last point come about; heights: of the maps before, between and behind."""
    wanted = [rows]
    for layer, height in zip(reversed(layers), reversed(heights[:-1]), strict=True):
        wanted.append(layer.reads(wanted[-1], height))
    wanted.reverse()
    came, used = [wanted[0]], []
    for layer, right in zip(layers, wanted, strict=False):
        resizes = layer.factor[1] > 1 or layer.stride[1] > 1
        used.append(right if resizes else came[-1])
        came.append(layer.makes(used[-1]))
    return Course(tuple(came), (*used, rows))
