"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: what a program keeps, codes in shared
memory and sums in registers, must fit into 99 KB (sm_89) or 227 KB (sm_90, sm_100) and 255
registers a thread.
"""

from dataclasses import dataclass

MAX_HEAD_DIM = 128
# Tokens whose sums one program of the statistics makes, in steps of so many.
CHUNK, STEP = 1024, 64


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program of the attention holds at a time; ``block`` lanes for a head."""

    block: int
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def attend_tile(head_dim: int, *, large_memory: bool = True) -> Tile:
    """A block of queries, which goes through all keys.

    On Hopper two groups of four warps have 64 queries each: sums, those of the present block of
    keys and its scores are 160 registers a thread, where 128 keys at a time would spill.

    large_memory: the shared memory of sm_90 and sm_100, else that of sm_89.
    """
    stages = 3 if large_memory else 2
    return Tile(block=lanes_of(head_dim), queries=128, keys=64, num_warps=8, num_stages=stages)


def lanes_of(head_dim: int) -> int:
    """Lanes for a head; a product of codes takes 32 features at least."""
    return max(32, 1 << (head_dim - 1).bit_length())


def num_warps_of(rows: int) -> int:
    """Warps that code so many rows of queries or keys."""
    return max(4, rows // 16)


def num_chunks(length: int) -> int:
    """Programs that share the statistics of a head; of the length alone, so that bits are too."""
    return -(-length // CHUNK)
