"""Which attention windows a model can do with: measured on the user's model and prompts.

The model runs as it is, dense. At a few denoising steps the attention of every block is computed
again with every candidate window, and compared head by head. What is seen of the text counts
nothing: it is always in sight.
"""

import heapq
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.kernels.sliding_tile_attention.windows import fraction, tiles
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.ops import SlidingTiles, attention

Sizes = tuple[int, int, int]
# The largest tile that is chosen unasked: 384 tokens, three blocks of the kernels.
LARGEST_TILE = (6, 8, 8)
# Candidates that save less than this are not tried.
_LEAST_SAVING = 0.05
_FEW_TILES = 4


@dataclass(frozen=True)
class Figure:
    """What one window does to one head, over all that was looked at.

    error: relative L2 distance of the head's output on video tokens from the dense one, at worst
    recall: share of the attention of video tokens that goes to what they still see, at least
    """

    error: float = 0.0
    recall: float = 1.0

    def worst(self, other: "Figure") -> "Figure":
        """Both together."""
        return Figure(max(self.error, other.error), min(self.recall, other.recall))


@dataclass
class Measures:
    """Figures by block, head and window, and what the windows cost.

    text: the most text tokens of a sample
    seconds: by window, what its fastest call took
    """

    grid: Sizes
    tile: Sizes
    candidates: tuple[Sizes, ...]
    text: int = 0
    figures: dict[tuple[str, int], dict[Sizes, Figure]] = field(default_factory=dict)
    seconds: dict[Sizes, float] = field(default_factory=dict)

    @property
    def full(self) -> Sizes:
        """The window that sees everything, the last of the candidates."""
        return self.candidates[-1]

    def cost(self, window: Sizes) -> float:
        """What is left of the FLOPs of dense attention."""
        return fraction(self.grid, self.tile, window, self.text)

    def add(self, block: str, head: int, window: Sizes, figure: Figure) -> None:
        """Take one more measurement into account."""
        by_window = self.figures.setdefault((block, head), {})
        by_window[window] = figure.worst(by_window.get(window, figure))

    def summary(self, window: Sizes) -> tuple[float, float, float]:
        """Mean and worst error, and mean recall, of a window over all heads."""
        found = [by_window[window] for by_window in self.figures.values()]
        errors = [figure.error for figure in found]
        recall = sum(figure.recall for figure in found) / len(found)
        return sum(errors) / len(errors), max(errors), recall


def default_tile(grid: Sizes) -> Sizes:
    """At most ``LARGEST_TILE``, and three tiles or more along every axis that has the tokens."""
    t, h, w = (min(most, -(-size // 3)) for most, size in zip(LARGEST_TILE, grid, strict=True))
    return t, h, w


def default_candidates(grid: Sizes, tile: Sizes) -> tuple[Sizes, ...]:
    """Windows of odd length or whole along each axis that save something; the last is whole.

    Along an axis of few tiles those of even length too.
    """
    counts = tiles(grid, tile)
    axes = [[*range(1, count, 1 if count <= _FEW_TILES else 2), count] for count in counts]
    found = sorted(itertools.product(*axes), key=lambda each: fraction(grid, tile, each))
    saving = [each for each in found if fraction(grid, tile, each) <= 1 - _LEAST_SAVING]
    return (*saving, counts)


def read_candidates(windows: Sequence[Sizes], grid: Sizes, tile: Sizes) -> tuple[Sizes, ...]:
    """Windows that somebody asks for, each once and within the grid; the last is whole."""
    counts = tiles(grid, tile)
    found = []
    for window in windows:
        t, h, w = (min(size, count) for size, count in zip(window, counts, strict=True))
        found.append((t, h, w))
    asked = [each for each in dict.fromkeys(found) if each != counts]
    return (*sorted(asked, key=lambda each: fraction(grid, tile, each)), counts)


@contextmanager
def measuring(
    transformer: HunyuanVideoTransformer, measures: Measures, steps: Sequence[int]
) -> Iterator[None]:
    """Measure, inside the block, the calls of a transformer with these numbers, from 0."""
    call = itertools.count()
    now = -1

    def begin(*_: Any) -> None:
        nonlocal now
        now = next(call)

    def look(name: str) -> Any:
        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if now in steps:
                _measure(measures, name, *inputs[:4])

        return after

    hooks = [transformer.register_forward_pre_hook(begin)]
    for name in transformer.attention_blocks():
        module = transformer.get_submodule(f"{name}.attention")
        hooks.append(module.register_forward_hook(look(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _measure(
    measures: Measures, block: str, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor
) -> None:
    """Compare every candidate with dense attention in one call of a block."""
    grid = measures.grid
    video = grid[0] * grid[1] * grid[2]
    measures.text = max(measures.text, int(kv_len.max()) - video)
    dense, dense_lse = _timed(measures, measures.full, q, k, v, kv_len)
    norm = dense[:, :video].float().square().sum((1, 3))  # (B, N)
    for window in measures.candidates[:-1]:
        out, lse = _timed(measures, window, q, k, v, kv_len)
        distance = (out - dense)[:, :video].float().square().sum((1, 3))
        error = (distance / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt().amax(0)
        recall = torch.exp((lse - dense_lse)[:, :, :video]).mean(-1).amin(0)
        for head, figure in enumerate(zip(error.tolist(), recall.tolist(), strict=True)):
            measures.add(block, head, window, Figure(*figure))
    for head in range(q.shape[2]):
        measures.add(block, head, measures.full, Figure())


def _timed(
    measures: Measures, window: Sizes, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor
) -> tuple[Tensor, Tensor]:
    pattern = (
        None if window == measures.full else SlidingTiles(measures.grid, measures.tile, window)
    )
    _wait_for(q)
    start = time.perf_counter()
    out, lse = attention(q, k, v, kv_len=kv_len, pattern=pattern, return_lse=True)
    _wait_for(q)
    spent = time.perf_counter() - start
    measures.seconds[window] = min(measures.seconds.get(window, spent), spent)
    return out, lse


def _wait_for(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def spread(count: int, steps: int) -> tuple[int, ...]:
    """``count`` numbers of ``steps`` denoising steps, evenly spread; the middle one for one."""
    count = min(count, steps)
    return tuple((2 * i + 1) * steps // (2 * count) for i in range(count))


def choose(
    measures: Measures, model: str, *, max_error: float | None = None, budget: float | None = None
) -> AttentionWindows:
    """Windows for every head: one of the two limits must be given.

    max_error: the cheapest window with at most this error, for every head by itself
    budget: at most this share of the FLOPs of dense attention, over all heads; what saves most for
        the squared error that it adds goes first
    Raises ValueError when the budget cannot be met by any of the candidates.
    """
    if (max_error is None) == (budget is None):
        raise ValueError("max_error or budget must be given, and not both")
    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max_error must be at least 0, got {max_error}")
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, got {budget}")
    if max_error is not None:
        chosen = {
            head: min(
                (window for window, found in figures.items() if found.error <= max_error),
                key=measures.cost,
            )
            for head, figures in measures.figures.items()
        }
    else:
        assert budget is not None
        chosen = _within(measures, budget)
    blocks: dict[str, list[Sizes]] = {}
    for (block, _), window in sorted(chosen.items(), key=lambda item: item[0][1]):
        blocks.setdefault(block, []).append(window)
    names = dict.fromkeys(block for block, _ in measures.figures)
    return AttentionWindows(
        model=model,
        grid=measures.grid,
        tile=measures.tile,
        blocks={name: tuple(blocks[name]) for name in names},
    )


def _within(measures: Measures, budget: float) -> dict[tuple[str, int], Sizes]:
    """Head by head to cheaper windows, the cheapest trade first, until the budget is met."""
    costs = {window: measures.cost(window) for window in measures.candidates}
    heads = {head: _frontier(figures, costs) for head, figures in measures.figures.items()}
    allowed = budget * len(heads)
    total = sum(costs[steps[0]] for steps in heads.values())
    place = dict.fromkeys(heads, 0)
    trades: list[tuple[float, tuple[str, int]]] = []

    def offer(head: tuple[str, int]) -> None:
        steps, at = heads[head], place[head]
        if at + 1 < len(steps):
            slope = _slope(measures.figures[head], costs, steps[at], steps[at + 1])
            heapq.heappush(trades, (slope, head))

    for head in heads:
        offer(head)
    while total > allowed and trades:
        _, head = heapq.heappop(trades)
        steps, at = heads[head], place[head]
        total -= costs[steps[at]] - costs[steps[at + 1]]
        place[head] = at + 1
        offer(head)
    if total > allowed:
        raise ValueError(
            f"budget must be at least {total / len(heads):.3f}, which the smallest windows cost, "
            f"got {budget}; try smaller tiles or windows"
        )
    return {head: steps[place[head]] for head, steps in heads.items()}


def _frontier(figures: Mapping[Sizes, Figure], costs: Mapping[Sizes, float]) -> list[Sizes]:
    """Windows from dearest to cheapest such that each trade adds more error per saving."""
    hull: list[Sizes] = []
    for window in sorted(figures, key=lambda each: (-costs[each], figures[each].error)):
        if hull and costs[window] == costs[hull[-1]]:
            continue  # no better than the other
        while hull and figures[window].error <= figures[hull[-1]].error:
            hull.pop()  # cheaper and no worse
        while len(hull) > 1 and _slope(figures, costs, hull[-1], window) <= _slope(
            figures, costs, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(window)
    return hull


def _slope(
    figures: Mapping[Sizes, Figure], costs: Mapping[Sizes, float], dear: Sizes, cheap: Sizes
) -> float:
    """Squared error added per FLOPs saved: the errors of independent heads add up in squares."""
    added = figures[cheap].error ** 2 - figures[dear].error ** 2
    return added / (costs[dear] - costs[cheap])
