"""Launch choices: pure functions of sizes and element size, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: a lane moves 16 bytes per access, two such
accesses per tensor are in flight, and some 40 registers leave 12 blocks of four warps on a
multiprocessor.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How one Triton program holds its part of a row: ``block`` lanes, a power of two."""

    block: int
    num_warps: int


def triton_block(width: int, element_size: int) -> BlockConfig:
    """Two accesses of 16 bytes per thread, or a whole row where that is shorter."""
    per_thread = 2 * 16 // element_size
    block = max(32, min(128 * per_thread, 1 << (width - 1).bit_length()))
    return BlockConfig(block=block, num_warps=max(1, min(4, block // (32 * per_thread))))
