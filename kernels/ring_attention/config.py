"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: a program reads rows of the accumulator and
of the part, some 16 elements of each for a thread, so that loads of several rows are in flight and
registers leave many programs on a multiprocessor.
"""

from dataclasses import dataclass

_THREADS = 128
_PER_THREAD = 16


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What one Triton program holds: ``rows`` of ``width`` elements, powers of two."""

    rows: int
    width: int
    num_warps: int = _THREADS // 32


def merge_block(dim: int) -> BlockConfig:
    """As many rows as make 16 elements for each of 128 threads, at least one."""
    width = max(16, 1 << (dim - 1).bit_length())
    return BlockConfig(rows=max(1, _THREADS * _PER_THREAD // width), width=width)
