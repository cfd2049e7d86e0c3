"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: what a program keeps of a head, tiles of
the inputs in shared memory and sums in registers, must fit into 163 KB on Ampere and 227 KB on
Hopper and Blackwell, and into 255 registers a thread.
"""

from dataclasses import dataclass

MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds at a time: ``queries`` and ``keys`` of ``block`` lanes per head.

    descriptors: whether its tiles come through tensor descriptors (the TMA unit).
    """

    block: int
    queries: int
    keys: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def forward_tile(head_dim: int, arch: int = 80) -> Tile:
    """A block of queries, which goes through all keys."""
    block = _block(head_dim)
    if block > 128:
        return Tile(block=block, queries=128, keys=32, num_warps=8, num_stages=2)
    return Tile(block=block, queries=128, keys=64, num_warps=8, num_stages=3)


def query_gradient_tile(head_dim: int, arch: int = 80) -> Tile:
    """As forward, with the gradients of the outputs beside the queries."""
    block = _block(head_dim)
    if block > 128:
        return Tile(block=block, queries=64, keys=32, num_warps=8, num_stages=1)
    return Tile(block=block, queries=128, keys=32, num_warps=8, num_stages=2)


def key_gradient_tile(head_dim: int, arch: int = 80) -> Tile:
    """A block of keys, which goes through all queries: two sums."""
    block = _block(head_dim)
    if block > 128:
        return Tile(block=block, queries=32, keys=64, num_warps=8, num_stages=1)
    return Tile(block=block, queries=32, keys=128, num_warps=8, num_stages=2)


def _block(head_dim: int) -> int:
    """Lanes for a head; a matrix product takes 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())
