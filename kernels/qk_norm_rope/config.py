"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: a lane moves 16 bytes per access, the
tables of a row are read once for many heads, and what is in flight per multiprocessor covers the
latency of memory.
"""

from dataclasses import dataclass

# The tables and weights of a row wait for its heads in buffers of this many features.
MAX_HEAD_DIM = 512
# Programs that fill 132 multiprocessors with seven each, four times over.
MANY_PROGRAMS = 4096


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a Triton program holds of one head: ``rows`` of ``block`` lanes, over ``num_warps``."""

    block: int
    rows: int
    num_warps: int


def rows_per_chunk(num_rows: int) -> int:
    """How many rows of the joint sequences are added up in one partial sum on the CPU.

    It depends on the number of rows alone, not on the threads, and so do the sums, bit for bit.
    128 chunks keep that many threads busy.
    """
    return max(8, -(-num_rows // 128))


def triton_tile(head_dim: int) -> Tile:
    """1024 lanes over four warps: a thread moves 8 features, 16 bytes of bf16 or twice 16 of fp32.

    A program has six kilobytes of q, k and v in bf16 in flight, and a multiprocessor registers for
    seven programs: more than what its share of 4.8 TB/s brings in a microsecond.
    """
    block = max(32, 1 << (head_dim - 1).bit_length())
    return Tile(block=block, rows=max(1, 1024 // block), num_warps=4)


def heads_per_program(num_programs: int, num_heads: int) -> int:
    """How many heads of its rows one program goes through, of ``num_programs`` blocks of rows.

    All of them if the rows alone make programs enough, so that the tables are read once; fewer when
    a short sequence would leave multiprocessors idle.
    """
    groups = min(num_heads, max(1, MANY_PROGRAMS // max(1, num_programs)))
    return -(-num_heads // groups)


def gpu_rows_per_chunk(length: int, tile: Tile) -> int:
    """``rows_per_chunk`` for a GPU, of one sample: whole tiles.

    Up to 4096 chunks: at 119,056 tokens their sums, 4 MB, are 0.1 % of the traffic.
    """
    tiles = -(-length // tile.rows)
    return tile.rows * max(1, -(-tiles // MANY_PROGRAMS))
