"""Launch choices: pure functions of sizes."""


def rows_per_chunk(length: int, *, min_rows: int = 16, max_chunks: int = 128) -> int:
    """How many rows of a sample the CPU adds up in one partial sum of dshift and dscale.

    It depends on the length alone and not on the number of threads, and so do the sums, bit for
    bit. 128 chunks keep that many threads busy, and their sums small: 3 MB at E = 3072.
    """
    return max(min_rows, -(-length // max_chunks))
