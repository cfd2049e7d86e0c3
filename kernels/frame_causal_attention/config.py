"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: what a program keeps of a head, tiles of
the inputs in shared memory and sums in registers, must fit into 163 KB and 255 registers a thread;
on Hopper into 227 KB.
"""

from dataclasses import dataclass

# The VAE has one head of 512 features; more would not fit into a program.
MAX_HEAD_DIM = 512


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds at a time: ``queries`` and ``keys`` of ``block`` lanes per head.

    values: how many features of the outputs it makes.
    """

    block: int
    values: int
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def forward_tile(head_dim: int, tokens_per_frame: int, hopper: bool = False) -> Tile:
    """A block of queries of one frame, which goes through its keys.

    Heads of 512 features are split: two programs make the scores, half as much work again, and one
    half of the outputs each. Sums for all 512 features would leave room for 32 queries only, too
    few for the matrix instructions of sm_90, and twice the traffic of keys and values.

    On Hopper 128 queries and 64 keys fit (196 KB, 240 registers): half of that traffic again, and
    products as tall as two groups of four warps take side by side.
    """
    block = _block(head_dim)
    if hopper and block == MAX_HEAD_DIM and tokens_per_frame >= 128:
        return Tile(block=block, values=256, queries=128, keys=64, num_warps=8, num_stages=1)
    queries = _rows(tokens_per_frame, 64)
    many = block > 128
    return Tile(
        block=block,
        values=min(block, 256),
        queries=queries,
        keys=32,
        num_warps=8 if many else 4,
        num_stages=1 if many else 2,
    )


def query_gradient_tile(head_dim: int, tokens_per_frame: int) -> Tile:
    """As forward, with the gradients of the outputs beside the queries."""
    block = _block(head_dim)
    if block > 256:
        queries = _rows(tokens_per_frame, 32)
        return Tile(block=block, values=block, queries=queries, keys=32, num_warps=8, num_stages=1)
    queries = _rows(tokens_per_frame, 32 if block > 128 else 64)
    return Tile(block=block, values=block, queries=queries, keys=32, num_warps=4, num_stages=1)


def key_gradient_tile(head_dim: int, tokens_per_frame: int) -> Tile:
    """A block of keys of one frame, which goes through the queries that see it: two sums."""
    block = _block(head_dim)
    if block > 256:
        keys = _rows(tokens_per_frame, 32)
        return Tile(block=block, values=block, queries=16, keys=keys, num_warps=8, num_stages=1)
    keys = _rows(tokens_per_frame, 32 if block > 128 else 64)
    return Tile(block=block, values=block, queries=32, keys=keys, num_warps=4, num_stages=1)


def _block(head_dim: int) -> int:
    """Lanes for a head; a matrix product takes 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _rows(tokens_per_frame: int, most: int) -> int:
    """Rows of a block within a frame: no more than it needs, 16 at least for a matrix product."""
    return min(most, max(16, 1 << (tokens_per_frame - 1).bit_length()))
