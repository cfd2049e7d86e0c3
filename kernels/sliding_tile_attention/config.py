"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: tiles of the inputs in shared memory and
sums in registers must fit into 163 KB and 255 registers a thread.
"""

from dataclasses import dataclass

MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds at a time: ``queries`` and ``keys``, of ``block`` lanes per head."""

    block: int
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def forward_tile(head_dim: int, tile_tokens: int, hopper: bool = False) -> Tile:
    """A block of queries of one tile, which goes through the keys that the tile sees.

    Before Hopper products have their factors in registers, and 32 keys at a time are what is left
    room for at 128 features.
    """
    block = _block(head_dim)
    queries = _rows(tile_tokens, 64 if block > 128 else 128)
    few = block > 128 or (block > 64 and not hopper)
    return Tile(
        block=block,
        queries=queries,
        keys=32 if few else 64,
        num_warps=8 if queries >= 64 else 4,
        num_stages=2,
    )


def query_gradient_tile(head_dim: int, tile_tokens: int, hopper: bool = False) -> Tile:
    """As forward, with the gradients of the outputs beside the queries."""
    block = _block(head_dim)
    queries = _rows(tile_tokens, 32 if block > 128 else 64)
    return Tile(block=block, queries=queries, keys=32, num_warps=4, num_stages=1)


def key_gradient_tile(head_dim: int, tile_tokens: int, hopper: bool = False) -> Tile:
    """A block of keys of one tile, which goes through the queries that see the tile: two sums."""
    block = _block(head_dim)
    keys = _rows(tile_tokens, 32 if block > 128 else 64)
    num_warps = 8 if keys >= 32 else 4
    return Tile(block=block, queries=32, keys=keys, num_warps=num_warps, num_stages=1)


def _block(head_dim: int) -> int:
    """Lanes for a head; a matrix product takes 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _rows(tile_tokens: int, most: int) -> int:
    """Rows of a block within a tile: no more than it needs, 16 at least for a matrix product."""
    return min(most, max(16, 1 << (tile_tokens - 1).bit_length()))
