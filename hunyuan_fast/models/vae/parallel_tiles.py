"""Overlapping tiles dealt out to several processes, and blended to the bits of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.collectives import broadcast
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.cost import Ledger
from hunyuan_fast.models.vae.layers import Half, Size
from hunyuan_fast.models.vae.tiling import Box, Window, blend_tiles, part_of, tile_boxes


def deal(costs: Sequence[float], hands: int) -> list[int]:
    """Who takes what: the dearest goes first, each to the one who has least so far."""
    loads = [0.0] * hands
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(hands), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def in_tiles(
    run: Callable[[Tensor], Tensor],
    config: VAEConfig,
    half: Half,
    clip: Tensor,
    windows: tuple[Window, Window],
    group: ProcessGroup,
    dtype: torch.dtype,
) -> Tensor:
    """What `map_tiles` has for a clip that all ranks have, on all of them.

    run: a tile to its result, which is in dtype; windows: of space and of time

    Each rank keeps the results of its own tiles until all are done. Then they go round one after
    the other, as blending asks for them, so that no rank ever has them all.
    """
    size = clip.shape[2], clip.shape[3], clip.shape[4]
    boxes = tile_boxes(size, *windows)
    ledgers = {box: Ledger(config, half, _size(box), dtype, "reference") for box in boxes}
    owners = dict(
        zip(boxes, deal([sum(ledgers[b].flops) for b in boxes], group.size()), strict=True)
    )
    results = {box: run(part_of(clip, box)) for box in boxes if owners[box] == group.rank()}

    def fetch(box: Box) -> Tensor:
        last = ledgers[box].layers[-1]
        shape = (len(clip), *ledgers[box].sizes[-1], last.outputs)
        # features are adjacent in memory
        mine = (
            results.pop(box).movedim(1, -1)
            if box in results
            else clip.new_empty(shape, dtype=dtype)
        )
        return broadcast(mine, owners[box], group).movedim(-1, 1)

    return blend_tiles(fetch, size, *windows)


def _size(box: Box) -> Size:
    frames, rows, columns = (stop - start for start, stop in box)
    return frames, rows, columns
