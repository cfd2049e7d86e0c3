"""Launch choices: pure functions of sizes and element size, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic: a lane moves 16 bytes per access, a row
stays in registers, and what is in flight per multiprocessor covers the latency of memory.
"""

from dataclasses import dataclass

# A row must fit into the registers of one program, or of one block of threads.
MAX_WIDTH = 8192
CUDA_MAX_THREADS = 512
# The sums of a chunk are kept for each of M vectors: more of them leave too few chunks.
MAX_VECTORS = 32


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """How one Triton program holds a row: ``block`` lanes, a power of two, over ``num_warps``."""

    block: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class CudaConfig:
    """How one CUDA block holds a row: each of ``threads`` keeps ``vectors`` of 16 bytes."""

    threads: int
    vectors: int


def rows_per_chunk(
    length: int, vectors: int = 1, *, min_rows: int = 16, max_chunks: int = 128
) -> int:
    """How many rows of a sample are added up in one partial sum of the vectors' gradients.

    It depends on the length and on the number of vectors alone, not on the threads or the GPU, and
    so do the sums, bit for bit. On the CPU 128 chunks keep that many threads busy, and their sums
    small: 3 MB at E = 3072 for shift and scale, however many vectors share them.
    """
    return max(min_rows, -(-length // max(1, max_chunks // vectors)))


def gpu_rows_per_chunk(length: int, vectors: int = 1) -> int:
    """``rows_per_chunk`` for a GPU.

    512 chunks fill 132 multiprocessors with two programs each, almost twice over, and their sums
    are 1 % of the traffic at 119,056 tokens.
    """
    return rows_per_chunk(length, vectors, min_rows=4, max_chunks=512)


def triton_max_width(element_size: int, *, both: bool) -> int:
    """With both halves backward keeps three sums and a row of each tensor: in fp32 8192 spill."""
    return 6144 if both and element_size == 4 else MAX_WIDTH


def triton_forward(width: int) -> RowConfig:
    """16 elements per thread: two accesses of 16 bytes for 16-bit rows, four for fp32."""
    return _row_config(width, elements_per_thread=16, max_warps=16)


def triton_backward(width: int, *, both: bool = False) -> RowConfig:
    """As forward: a row, its gradient, the gain and two sums take some 100 registers.

    With both halves a thread holds half as many elements: rows and sums are more.
    """
    return _row_config(width, elements_per_thread=8 if both else 16, max_warps=16)


def cuda_forward(width: int, element_size: int) -> CudaConfig:
    """Up to four vectors per thread: 64 bytes in flight each, some 60 registers."""
    return _cuda_config(width, element_size, max_vectors=4)


def cuda_backward(width: int, element_size: int) -> CudaConfig:
    """Two vectors of 16-bit elements or three of fp32: what 128 registers hold without spilling."""
    return _cuda_config(width, element_size, max_vectors=2 if element_size == 2 else 3)


def cuda_max_width(element_size: int) -> int:
    """The widest row that both CUDA kernels hold: 8192 elements of 16 bits, 6144 of fp32."""
    return CUDA_MAX_THREADS * (2 if element_size == 2 else 3) * (16 // element_size)


def _cuda_config(width: int, element_size: int, *, max_vectors: int) -> CudaConfig:
    vectors_per_row = -(-width * element_size // 16)
    threads = 32 * -(-vectors_per_row // (32 * max_vectors))
    return CudaConfig(threads=threads, vectors=-(-vectors_per_row // threads))


def _row_config(width: int, *, elements_per_thread: int, max_warps: int) -> RowConfig:
    block = max(32, 1 << (width - 1).bit_length())
    num_warps = max(1, min(max_warps, block // (32 * elements_per_thread)))
    return RowConfig(block=block, num_warps=num_warps)
