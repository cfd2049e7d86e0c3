"""Launch choices: pure functions of sizes, so that tests can ask them anything.

No GPU has timed these yet. They follow from arithmetic and from the machine code: what a program
keeps of a head, tiles in shared memory and sums in registers, must fit into 99 KB on the smallest
GPUs and 227 KB on Hopper and Blackwell, and into 255 registers a thread without spills.

At D = 128 a block of 128 rows makes 128 products of every number it loads: less, and the second
level of cache limits Hopper. There two groups of four warps take 64 rows each, the smallest height
of its matrix instructions.
"""

from dataclasses import dataclass

MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds at a time: ``queries`` and ``keys`` of ``block`` lanes per head.

    descriptors: its tiles come through tensor descriptors, by the TMA unit.
    ahead: it asks for the scores of the next tile before it sums this one up.
    """

    block: int
    queries: int
    keys: int
    num_warps: int = 8
    num_stages: int = 2
    descriptors: bool = False
    ahead: bool = False


def forward_tile(head_dim: int, arch: int = 80, aligned: bool = True) -> Tile:
    """A block of queries, which goes through all keys.

    arch: compute capability without the point. aligned: rows start at multiples of 16 bytes.
    """
    block = _block(head_dim)
    if aligned and _has_tensor_memory_unit(arch):
        if block > 128:
            return Tile(block=block, queries=128, keys=64, descriptors=True)
        # On Blackwell sums are not in registers, and the compiler orders the products itself.
        return Tile(block=block, queries=128, keys=128, descriptors=True, ahead=arch < 100)
    if block > 128:
        return Tile(block=block, queries=64, keys=32)
    return Tile(block=block, queries=128, keys=64, num_stages=3)


def query_gradient_tile(head_dim: int, arch: int = 80, aligned: bool = True) -> Tile:
    """As forward, with the gradients of the outputs beside the queries."""
    block = _block(head_dim)
    if aligned and _has_tensor_memory_unit(arch):
        if block > 128:
            return Tile(block=block, queries=128, keys=32, num_stages=1, descriptors=True)
        return Tile(block=block, queries=128, keys=64, descriptors=True)
    if block > 128:
        return Tile(block=block, queries=64, keys=32, num_stages=1)
    return Tile(block=block, queries=128, keys=32)


def key_gradient_tile(head_dim: int, arch: int = 80, aligned: bool = True) -> Tile:
    """A block of keys, which goes through all queries: two sums."""
    block = _block(head_dim)
    if block > 128:
        return Tile(block=block, queries=32, keys=32, num_stages=1)
    if aligned and _has_tensor_memory_unit(arch):
        return Tile(block=block, queries=64, keys=128, descriptors=True)
    return Tile(block=block, queries=32, keys=64, num_warps=4)


def _block(head_dim: int) -> int:
    """Lanes for a head; a matrix product takes 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _has_tensor_memory_unit(arch: int) -> bool:
    """Hopper, and the Blackwell of data centres.

    Others of Blackwell (12.x) have the unit as well, but the matrix instructions of Ampere, whose
    operands would go from shared memory to registers as a whole.
    """
    return 90 <= arch < 120
