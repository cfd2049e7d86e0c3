"""The VAE across processes against one: values, bits of tiles, bytes, memory, planted mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hunyuan_fast.distributed.shards import split_sizes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.cut import Cut
from hunyuan_fast.models.vae.parallel_tiles import deal
from hunyuan_fast.models.vae.tiling import Tiling, latent_window, pixel_window, tile_boxes
from tests.distributed import vae_ranks
from tests.distributed.vae_ranks import FAULTS, Shape
from tests.kit.ranks import RankPool
from tests.models.vae_cases import TINY

# Images and clips, higher and wider, whose latents nothing divides; the last ones leave ranks idle.
SHAPES: list[Shape] = [(2, 1, 5, 3), (2, 9, 2, 7), (1, 5, 1, 2)]
# fp32 of other sums than those of one process; float64 shows that nothing else is different
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
OTHERS: list[dict[str, Any]] = [
    {"mid_block_add_attention": False},
    {"spatial_compression_ratio": 2, "temporal_compression_ratio": 8},
    {
        "block_out_channels": (8,),
        "spatial_compression_ratio": 1,
        "temporal_compression_ratio": 1,
    },
]
SMALL = Tiling(size=32, size_stride=24, frames=8, frames_stride=4)


def check(results: list[list[vae_ranks.Difference]], dtype: torch.dtype) -> None:
    for largest, difference in results[0]:
        assert largest > 0.5, "the test must see pixels and latents"
        assert difference <= BOUNDS[dtype]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_strips_give_the_values_of_one_process(
    ranks: RankPool, count: int, dtype: torch.dtype
) -> None:
    found = ranks.run(count, vae_ranks.differences, SHAPES, dtype, timeout=120)
    check(found, dtype)


def test_a_group_of_one(ranks: RankPool) -> None:
    (found,) = ranks.run(1, vae_ranks.differences, SHAPES[:1], torch.float32)
    assert [difference for _, difference in found] == [0, 0]


def test_other_networks(ranks: RankPool) -> None:
    """Without attention, with time halved where space is not, with a single level."""
    for changes in OTHERS:
        found = ranks.run(3, vae_ranks.differences, [(1, 9, 4, 3)], torch.float64, changes)
        check(found, torch.float64)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bf16(ranks: RankPool, autocast: bool) -> None:
    """The error against float64 is at most twice that of one process; a rank is idle at last."""
    shapes = [(1, 5, 5, 3), (1, 5, 2, 2)]
    for found in ranks.run(3, vae_ranks.errors_in_bf16, shapes, autocast):
        assert all(0 < shared <= 2 * alone for alone, shared in found)


def test_a_group_within_the_world(ranks: RankPool) -> None:
    shapes, members = [(1, 5, 5, 3)], [1, 2]
    outside, *inside = ranks.run(3, vae_ranks.differences, shapes, torch.float32, {}, members)
    assert outside == []
    check(inside, torch.float32)


@pytest.mark.parametrize("name", FAULTS)
def test_mistakes_are_noticed(ranks: RankPool, name: str) -> None:
    found, _ = ranks.run(2, vae_ranks.with_fault, name, (1, 5, 5, 4))
    assert max(difference for _, difference in found) > 1e-2


@pytest.mark.parametrize("count", [2, 3, 4])
def test_bytes_and_messages(ranks: RankPool, count: int) -> None:
    """By hand: rows sent to each neighbour, the shape, statistics, keys and values, the result."""
    batch, frames, height, width = 2, 5, 9, 4
    t, half, item = 2, 3, 4
    # channels x frames x columns of every map whose rows go to both neighbours
    up = 9 * 16 * t * width + 4 * 16 * t * 2 * width
    up += 4 * 8 * half * 4 * width + 4 * 8 * frames * 8 * width
    down = 2 * 8 * frames * 8 * width + 2 * 8 * frames * 4 * width
    down += (8 + 16) * half * 2 * width + 7 * 16 * t * width
    # and of those before a halving, which only the next rank needs
    strided = 8 * frames * 8 * width + 8 * frames * 4 * width + 16 * half * 2 * width
    of_halos = {"decode": (21, up, 0, 0), "encode": (13, down, 3, strided)}
    of_norms = {"decode": 22, "encode": 14}
    of_result = {"decode": 3 * frames * 64, "encode": 2 * 4 * t}
    found = ranks.run(count, vae_ranks.traffic_of, (batch, frames, height, width), {})
    for index, name in enumerate(("encode", "decode")):
        messages, both, more, following = of_halos[name]
        for rank, rows in enumerate(split_sizes(height, count)):
            sent, before, after = found[rank][index], rank > 0, rank < count - 1
            wanted = batch * item * ((before + after) * both + after * following)
            assert sent.bytes["halo"] == wanted
            assert sent.messages["halo"] == (before + after) * messages + after * more
            norms = of_norms[name]
            wanted = 8 * 5 + 3 * batch * 4 * 8 * norms
            wanted += 2 * batch * t * rows * width * 16 * item
            wanted += batch * of_result[name] * rows * width * item
            assert sent.bytes["all_gather"] == (count - 1) * wanted
            assert sent.messages["all_gather"] == norms + 4
            assert set(sent.bytes) == {"halo", "all_gather"}


@pytest.mark.parametrize("changes", [{}, OTHERS[0], OTHERS[1]], ids=["", "still", "in time"])
def test_traffic_from_shapes(ranks: RankPool, changes: dict[str, Any]) -> None:
    """The formula, on clips of any shape."""
    shape = (2, 9, 4, 6)
    for rank, found in enumerate(ranks.run(3, vae_ranks.traffic_of, shape, changes)):
        for sent, (half, x) in zip(found, vae_ranks.inputs(shape).items(), strict=True):
            config = VAEConfig(**(TINY | changes))
            assert sent == Cut(config, half, tuple(x.shape), 3).traffic(rank, 4)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_memory_is_shared(ranks: RankPool, half: str) -> None:
    """Margins take a row in sixteen at least; the result is whole, at first in another order."""
    for count in (2, 4):
        for alone, shared, result in ranks.run(count, vae_ranks.peaks, half, (1, 5, 32, 2)):
            assert shared <= max(1.2 * alone / count, 3 * result)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_tiles_have_the_bits_of_one_process(ranks: RankPool, count: int) -> None:
    """Cut in space, in time, in both, in neither, which leaves all ranks but one idle."""
    shapes: list[Shape] = [(2, 5, 5, 9), (1, 17, 3, 4), (1, 21, 6, 3), (1, 5, 2, 2)]
    results = ranks.run(count, vae_ranks.tiles, SMALL, shapes)
    assert all(equal for found in results for equal, _ in found)
    for index, (batch, frames, height, width) in enumerate(shapes):
        for offset, window, size, values in (
            (0, pixel_window, (frames, 8 * height, 8 * width), 8 / (4 * 64)),
            (1, latent_window, ((frames - 1) // 4 + 1, height, width), 3 * 4 * 64),
        ):
            space = window(SMALL.size, SMALL.size_stride, 8)
            boxes = tile_boxes(size, space, window(SMALL.frames, SMALL.frames_stride, 4))
            sent = sum(found[2 * index + offset][1] for found in results)
            results_of_tiles = batch * 4 * sum(_values(box, values) for box in boxes)
            assert sent == (count - 1) * (count * 8 * 5 + results_of_tiles)


def _values(box: tuple[tuple[int, int], ...], each: float) -> float:
    """Results of a tile: the first frame stands alone in pixels and in latents."""
    frames, height, width = (stop - start for start, stop in box)
    if each < 1:
        return ((frames - 1) / 4 + 1) * 4 * height * width * each
    return (4 * (frames - 1) + 1) / 4 * height * width * each


def test_dealing_is_even() -> None:
    assert deal([1, 5, 4, 2], 2) == [1, 0, 1, 0] or deal([1, 5, 4, 2], 2) == [0, 0, 1, 1]
    assert deal([3.0], 3) == [0]
    assert deal([], 2) == []
    costs = [float(n % 7 + 1) for n in range(84)]
    for hands in (2, 3, 8):
        owners = deal(costs, hands)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == n) for n in range(hands)]
        assert max(loads) - min(loads) <= max(costs)
        assert max(loads) <= 1.02 * sum(costs) / hands


def test_refusals(ranks: RankPool) -> None:
    for said in ranks.run(2, vae_ranks.refusals):
        budget, bytes_, offload, gradients, shapes = said
        assert budget.startswith("memory_budget must be None with a group, got '1GiB'")
        assert bytes_.startswith("memory_budget must be None with a group, got 1073741824")
        assert offload.startswith("offload must be False without a memory_budget")
        assert gradients.startswith("group must be None while gradients are recorded")
        assert "got shapes [[1, 4, 1, 2, 1], [1, 4, 1, 2, 2]], rank by rank" in shapes
