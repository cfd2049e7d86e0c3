"""What the parallel schemes send: bytes and messages of one rank in one layer.

Every function counts what a rank *sends*; it receives as much where shards are equal. ``backward``
means the backward pass alone. Collectives are counted as rings of point-to-point messages, the
least that any algorithm can send: (p - 1) / p of the data for a gather or a reduce-scatter. A call
of a collective counts as one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

GRADIENT_BYTES = 4  # gradients of keys and values travel in float32


def _rows(rows_per_rank: int | Sequence[int], ranks: int) -> list[int]:
    """The rows of every rank."""
    if isinstance(rows_per_rank, int):
        return [rows_per_rank] * ranks
    if len(rows_per_rank) != ranks:
        raise ValueError(
            f"rows_per_rank must be one number or {ranks} of them, got {len(rows_per_rank)}"
        )
    return list(rows_per_rank)


def ring_attention_bytes(
    batch: int,
    rows_per_rank: int | Sequence[int],
    heads: int,
    head_dim: int,
    bytes_per_element: int,
    ranks: int,
    backward: bool,
    *,
    rank: int = 0,
) -> int:
    """Bytes that ``rank`` sends in ring attention of one layer.

    rows_per_rank: rows L_r of keys and values on each rank: one number, or one for every rank

    Forward: K and V, each (B, L_r, N, D), go P - 1 hops; a rank passes on every shard but that of
    its neighbour, where the ring ends. Backward: the same again, and dK and dV in float32 go P - 1
    hops, one behind: begun by the rank after the one where their keys live, they end there, and a
    rank passes on those of every shard but its own.
    """
    rows = _rows(rows_per_rank, ranks)
    if ranks == 1:
        return 0
    row = 2 * batch * heads * head_dim
    passed = sum(rows) - rows[(rank + 1) % ranks]
    sent = passed * row * bytes_per_element
    gradients = (sum(rows) - rows[rank]) * row * GRADIENT_BYTES
    return sent + gradients if backward else sent


def ring_attention_messages(ranks: int, backward: bool) -> int:
    """Hops of the ring: one message holds K and V, in backward another one dK and dV."""
    if ranks == 1:
        return 0
    return 2 * (ranks - 1) if backward else ranks - 1


def ulysses_bytes(
    batch: int,
    rows_per_rank: int | Sequence[int],
    heads: int,
    head_dim: int,
    bytes_per_element: int,
    ranks: int,
    backward: bool,
    *,
    rank: int = 0,
) -> int:
    """Bytes that ``rank`` sends to exchange rows for heads around attention in one layer.

    q, k and v go from (B, L_r, N, D) to (B, L, N_r, D) in one all-to-all, and what attention gives
    comes back in another. Backward: its gradient goes out, dq, dk and dv come back. Heads are
    shared out as evenly as they can be, the first ranks have one more.
    """
    rows = _rows(rows_per_rank, ranks)
    own = heads // ranks + (rank < heads % ranks)
    out = rows[rank] * (heads - own)  # rows of ours whose heads others have
    home = (sum(rows) - rows[rank]) * own  # rows of others whose heads we have
    exchanged = out + 3 * home if backward else 3 * out + home
    return batch * exchanged * head_dim * bytes_per_element


def ulysses_messages(ranks: int) -> int:
    """Calls of all-to-all in one layer, forward; backward has as many."""
    return 0 if ranks == 1 else 2


def all_gather_bytes(size: int, ranks: int) -> int:
    """Bytes a rank sends so that all have ``size`` bytes of which each held an equal share."""
    return size * (ranks - 1) // ranks


def reduce_scatter_bytes(size: int, ranks: int) -> int:
    """Bytes a rank sends so that each has the sum of its share of ``size`` bytes."""
    return size * (ranks - 1) // ranks


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes a rank sends so that all have the sum of ``size`` bytes: scattered, then gathered."""
    return 2 * size * (ranks - 1) // ranks


def tensor_parallel_collectives(kind: Literal["double", "single"]) -> int:
    """All-reduces over the tokens (or pairs of gather and reduce-scatter) in a block, one way.

    A double block has one behind the projection of attention and one behind its network, for each
    of its streams; counted over the tokens of both streams these are two. A single block has one.
    """
    return 2 if kind == "double" else 1


def tensor_parallel_bytes(
    batch: int,
    rows: int,
    dim: int,
    bytes_per_element: int,
    ranks: int,
    kind: Literal["double", "single"],
) -> int:
    """Bytes a rank sends for tensor parallelism in one block, forward; backward sends as many.

    rows: tokens of both streams on this context-parallel rank, before the tensor-parallel group
        shares them

    Each matrix that is split by rows ends in an all-reduce of (B, rows, E), each that is split by
    columns in one of its gradient. Sequence parallelism splits every all-reduce into a
    reduce-scatter and an all-gather around what lies between, and sends the same bytes.
    """
    size = batch * rows * dim * bytes_per_element
    return tensor_parallel_collectives(kind) * all_reduce_bytes(size, ranks)


def fsdp_gather_bytes(parameters: int, bytes_per_element: int, ranks: int) -> int:
    """Bytes a rank sends to make ``parameters``, of which each rank holds a share, whole on all.

    Fully sharded weights (ZeRO-3) are gathered for the forward pass and again for the backward
    pass; ZeRO-1 and 2 gather once after the optimiser's step.
    """
    return all_gather_bytes(parameters * bytes_per_element, ranks)


def fsdp_reduce_bytes(parameters: int, bytes_per_element: int, ranks: int) -> int:
    """Bytes a rank sends so that each holds the mean of its share of the gradients."""
    return reduce_scatter_bytes(parameters * bytes_per_element, ranks)


def halo_bytes(
    batch: int, channels: int, frames: int, width: int, rows: int, bytes_per_element: int
) -> int:
    """Bytes a rank sends to one neighbour before a convolution whose kernel reaches ``rows``."""
    return batch * channels * frames * width * rows * bytes_per_element
