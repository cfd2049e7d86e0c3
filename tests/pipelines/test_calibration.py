"""Calibration of attention windows: figures against plain sums, and the choices made of them."""

import itertools

import pytest
import torch

from hunyuan_fast.kernels.sliding_tile_attention.windows import tiles
from hunyuan_fast.ops import SlidingTiles, attention
from hunyuan_fast.pipelines import calibration
from hunyuan_fast.pipelines.calibration import Figure, Measures, choose, measuring
from tests.models.dit_cases import tiny_inputs, tiny_model

GRID, TILE = (3, 2, 3), (1, 1, 1)


def measures() -> Measures:
    """Two heads of one block: the first is local along W, the second sees far."""
    windows = ((1, 1, 1), (1, 1, 3), (3, 1, 1), (1, 2, 3), (3, 2, 3))
    found = Measures(GRID, TILE, windows)
    errors = {0: (0.5, 0.01, 0.4, 0.005, 0.0), 1: (0.9, 0.6, 0.5, 0.2, 0.0)}
    for head, each in errors.items():
        for window, error in zip(windows, each, strict=True):
            found.add("block", head, window, Figure(error, 1 - error))
    return found


def test_measures_what_it_says(generator):
    """Error and recall of one block, head by head, against attention computed here."""
    model, inputs = tiny_model(generator), tiny_inputs(generator)
    found = Measures(GRID, TILE, ((1, 1, 3), (3, 2, 3)))
    calls = []
    hook = model.get_submodule("single_blocks.1.attention").register_forward_pre_hook(
        lambda _, given: calls.append(tuple(x.clone() for x in given[:4]))
    )
    with torch.no_grad(), measuring(model, found, steps=(1,)):
        for scale in (1.0, 2.0, 3.0):
            model(**inputs | {"latents": scale * inputs["latents"]})
    hook.remove()
    assert set(found.figures) == {
        (name, head) for name, head in itertools.product(model.attention_blocks(), range(2))
    }
    assert found.text == 7

    q, k, v, kv_len = calls[1]
    pattern = SlidingTiles(GRID, TILE, (1, 1, 3))
    dense = attention(q, k, v, kv_len=kv_len)[:, :18].double()
    sparse = attention(q, k, v, kv_len=kv_len, pattern=pattern)[:, :18].double()
    for head in range(2):
        figure = found.figures["single_blocks.1", head][1, 1, 3]
        pairs = zip(sparse[:, :, head], dense[:, :, head], strict=True)
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        assert figure.error == pytest.approx(max(errors), rel=1e-4)
        recalls = []
        for item, length in enumerate(kv_len):
            query, key = (x[item, :length, head].double() for x in (q, k))
            weights = (query[:18] @ key.T * q.shape[-1] ** -0.5).softmax(-1)
            row = torch.arange(18) // 3
            seen = torch.cat((row[:, None] == row, torch.ones(18, length - 18).bool()), 1)
            recalls.append(float((weights * seen).sum(-1).mean()))
        assert figure.recall == pytest.approx(min(recalls), rel=1e-4)
        assert found.figures["single_blocks.1", head][3, 2, 3] == Figure()
    assert set(found.seconds) == set(found.candidates)


def test_the_model_is_left_as_it_was(generator):
    model, inputs = tiny_model(generator), tiny_inputs(generator)
    with torch.no_grad():
        expected = model(**inputs)
        with measuring(model, Measures(GRID, TILE, ((1, 1, 1), (3, 2, 3))), steps=(0,)):
            assert torch.equal(model(**inputs), expected)
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_the_worst_of_all_measurements_counts():
    found = Measures(GRID, TILE, ((1, 1, 1), (3, 2, 3)))
    for error, recall in ((0.1, 0.5), (0.3, 0.9), (0.2, 0.7)):
        found.add("block", 0, (1, 1, 1), Figure(error, recall))
    assert found.figures["block", 0][1, 1, 1] == Figure(0.3, 0.5)
    assert found.summary((1, 1, 1)) == (0.3, 0.3, 0.5)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.0, ((3, 2, 3), (3, 2, 3))),
        (0.01, ((1, 1, 3), (3, 2, 3))),
        (0.2, ((1, 1, 3), (1, 2, 3))),
        (0.55, ((1, 1, 1), (3, 1, 1))),
        (1.0, ((1, 1, 1), (1, 1, 1))),
    ],
)
def test_the_cheapest_window_below_an_error(limit, expected):
    chosen = choose(measures(), "tiny", max_error=limit)
    assert chosen.blocks == {"block": expected}
    assert (chosen.model, chosen.grid, chosen.tile) == ("tiny", GRID, TILE)


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.6, 0.4, 0.25, 0.1, 0.06])
def test_a_budget_is_kept_with_little_error(budget):
    """No choice of at most that cost has a smaller sum of squares."""
    found = measures()
    chosen = choose(found, "tiny", budget=budget)
    assert chosen.fraction() <= budget
    heads = chosen.blocks["block"]
    error = sum(found.figures["block", i][window].error ** 2 for i, window in enumerate(heads))
    for other in itertools.product(found.candidates, repeat=2):
        cost = sum(map(found.cost, other)) / 2
        rival = sum(found.figures["block", i][window].error ** 2 for i, window in enumerate(other))
        assert cost > chosen.fraction() - 1e-12 or rival >= error - 1e-12


def test_what_saves_most_for_its_error_goes_first():
    """The local head is narrowed before the other loses anything."""
    heads = choose(measures(), "tiny", budget=0.6).blocks["block"]
    assert heads == ((1, 1, 3), (3, 2, 3))


def test_limits_that_make_no_sense_are_refused():
    found = measures()
    with pytest.raises(ValueError, match=r"budget must be at least 0\.056.* got 0\.01"):
        choose(found, "tiny", budget=0.01)
    for limits in ({}, {"max_error": 0.1, "budget": 0.5}):
        with pytest.raises(ValueError, match="max_error or budget must be given, and not both"):
            choose(found, "tiny", **limits)
    with pytest.raises(ValueError, match="max_error must be at least 0, got -1"):
        choose(found, "tiny", max_error=-1)
    for budget in (0, 1.5):
        with pytest.raises(ValueError, match="budget must be above 0 and at most 1"):
            choose(found, "tiny", budget=budget)


@pytest.mark.parametrize("grid", [(33, 45, 80), (5, 6, 6), (1, 16, 16), (1, 1, 1)])
def test_tiles_and_candidates_for_any_grid(grid):
    tile = calibration.default_tile(grid)
    assert all(1 <= size <= most for size, most in zip(tile, (6, 8, 8), strict=True))
    counts = tiles(grid, tile)
    candidates = calibration.default_candidates(grid, tile)
    assert candidates[-1] == counts and len(set(candidates)) == len(candidates)
    found = Measures(grid, tile, candidates)
    costs = [found.cost(window) for window in candidates]
    assert costs == sorted(costs) and costs[-1] == 1
    assert calibration.read_candidates(candidates[:3], grid, tile)[-1] == counts
    assert len(calibration.read_candidates([(99, 99, 99)] * 2, grid, tile)) == 1


def test_steps_are_spread():
    assert calibration.spread(1, 50) == (25,)
    assert calibration.spread(3, 50) == (8, 25, 41)
    assert calibration.spread(9, 2) == (0, 1)
