"""What tiles see, on the host: pure functions of sizes."""

import math
from collections.abc import Iterator
from itertools import product

Sizes = tuple[int, int, int]
# One range of tokens along each axis.
Box = tuple[range, range, range]


def tiles(grid: Sizes, tile: Sizes) -> Sizes:
    """The number of tiles along each axis, the last of which may be smaller than the others."""
    t, h, w = (-(-size // step) for size, step in zip(grid, tile, strict=True))
    return t, h, w


def spans(size: int, tile: int, window: int) -> list[tuple[range, range]]:
    """Along one axis: all tokens in groups, and what each group sees.

    At the borders several tiles see the same: they are one group.
    """
    count = -(-size // tile)
    window = min(window, count)
    last = count - window
    found = []
    for first in range(last + 1):
        lowest = first + window // 2 if first else 0
        beyond = first + window // 2 + 1 if first < last else count
        own = range(lowest * tile, min(beyond * tile, size))
        found.append((own, range(first * tile, min((first + window) * tile, size))))
    return found


def boxes(grid: Sizes, tile: Sizes, window: Sizes) -> Iterator[tuple[Box, Box]]:
    """Boxes of tokens that cover the grid once, and the box that the tokens of each see."""
    for t, h, w in product(*(spans(*axis) for axis in zip(grid, tile, window, strict=True))):
        yield (t[0], h[0], w[0]), (t[1], h[1], w[1])


def pairs(grid: Sizes, tile: Sizes, window: Sizes, text: int = 0) -> int:
    """How many pairs of tokens see each other, with this many text tokens beside the video."""
    video = math.prod(grid)
    near = math.prod(
        sum(len(own) * len(seen) for own, seen in spans(*axis))
        for axis in zip(grid, tile, window, strict=True)
    )
    return near + 2 * video * text + text * text


def fraction(grid: Sizes, tile: Sizes, window: Sizes, text: int = 0) -> float:
    """The pairs that see each other, of all pairs: what is left of the FLOPs of attention."""
    return pairs(grid, tile, window, text) / (math.prod(grid) + text) ** 2
