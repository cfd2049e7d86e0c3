"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: the tiles of 16 bits are those of a matrix
product on tensor cores, 128 x 128 sums over eight warps; fp32 is multiplied by the ordinary units.

On Hopper 128 x 128 sums read 12 TB/s from the second-level cache to keep the tensor cores busy at
790 TFLOP/s, and need more than 128 registers a thread, so that a multiprocessor holds one such
program anyway. Twice as many sums read 9 TB/s and keep to 255 registers.
"""

from dataclasses import dataclass

# Partial sums of a weight's gradient, together, in floats: 256 MiB.
_MANY_PARTIALS = 2**26
# Programs that fill 132 multiprocessors with two each, four times over.
_MANY_PROGRAMS = 1024
# Fewer positions are not worth a partial sum of their own.
_FEW_POSITIONS = 512


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A program's sums, ``rows`` x ``columns``, and how many products it adds to each at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Places along one axis that stand for the same others: ``count`` of them from ``start`` on.

    Each stands for itself and for the places of the padded map from ``from_offset`` on, ``folds``
    of them, itself among them.
    """

    start: int
    count: int
    from_offset: int
    folds: int


def tile(
    columns: int,
    depth: int,
    element_size: int,
    activated: bool = False,
    hopper: bool = False,
) -> Tile:
    """For a product of many rows with ``columns`` results each, over ``depth`` channels a tap.

    Depths are those that spill no registers on sm_80, sm_90 and sm_100; the activation takes some.
    """
    if hopper and element_size == 2 and columns >= 128 and depth >= 64 and not activated:
        rows, wide = (256, 128) if columns < 256 else (128, 256)
        return Tile(rows=rows, columns=wide, depth=64, num_warps=8, num_stages=3)
    if element_size == 2:
        wide = _power_of_two(columns, 16, 128)
        narrow = _power_of_two(depth, 16, 32 if activated else 64)
        warps, stages = 8 if wide == 128 else 4, 4 if activated else 3
        return Tile(rows=128, columns=wide, depth=narrow, num_warps=warps, num_stages=stages)
    wide, narrow = _power_of_two(columns, 16, 64), _power_of_two(depth, 16, 32 if activated else 16)
    return Tile(rows=64, columns=wide, depth=narrow, num_warps=4, num_stages=2)


def weight_tile(channels: int, columns: int, element_size: int) -> Tile:
    """For the gradient of a weight: ``channels`` x ``columns`` per tap, over positions."""
    if element_size == 2:
        rows, wide = (_power_of_two(n, 16, 128) for n in (channels, columns))
        warps = 8 if rows * wide == 128 * 128 else 4
        return Tile(rows=rows, columns=wide, depth=64, num_warps=warps, num_stages=3)
    rows, wide = (_power_of_two(n, 16, 64) for n in (channels, columns))
    return Tile(rows=rows, columns=wide, depth=32, num_warps=4, num_stages=2)


def splits(positions: int, programs: int, weights: int) -> int:
    """In how many chunks the positions are summed apart, with ``programs`` for each of them.

    It depends on sizes alone, and so do the sums, bit for bit. weights: numbers in one partial sum.
    """
    fill = -(-_MANY_PROGRAMS // programs)
    return max(1, min(fill, _MANY_PARTIALS // weights, positions // _FEW_POSITIONS))


def segments(first: int, size: int, before: int, after: int) -> list[Segment]:
    """Places first .. first + size - 1; the ends stand for ``before`` and ``after`` others too."""
    if size == 1:
        return [Segment(start=first, count=1, from_offset=-before, folds=before + after + 1)]
    low, high = min(before, 1), min(after, 1)
    parts = (
        Segment(start=first, count=low, from_offset=-before, folds=before + 1),
        Segment(start=first + low, count=size - low - high, from_offset=0, folds=1),
        Segment(start=first + size - high, count=high, from_offset=0, folds=after + 1),
    )
    return [part for part in parts if part.count]


def _power_of_two(n: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (n - 1).bit_length()))
