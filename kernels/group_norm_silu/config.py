"""Launch choices of the Triton kernels: pure functions of sizes.

No GPU has timed these yet. They follow from arithmetic: a lane moves 16 bytes per access, and 2048
values in flight over four warps leave room for six programs on a multiprocessor.
"""

from dataclasses import dataclass

_VALUES = 2048
_MAX_CHANNELS = 512
# Tiles of a chunk. Its centre is the mean of the first one, which lies within the square root of
# this many deviations of all of them: the squares about it lose four bits at most.
MAX_TILES = 16
# Programs that fill 132 multiprocessors with six each, four times over.
MANY_PROGRAMS = 3072


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds: ``rows`` places of ``channels`` channels, both powers of two."""

    rows: int
    channels: int
    num_warps: int


def triton_tile(num_channels: int) -> Tile:
    """All channels of some places, or 512 channels of four."""
    channels = max(16, min(_MAX_CHANNELS, 1 << (num_channels - 1).bit_length()))
    return Tile(rows=_VALUES // channels, channels=channels, num_warps=4)


def rows_per_chunk(num_rows: int, tile: Tile) -> int:
    """How many places of a sample one program adds up: whole tiles, a function of sizes alone."""
    tiles = -(-num_rows // tile.rows)
    return tile.rows * min(MAX_TILES, max(1, tiles // MANY_PROGRAMS))
