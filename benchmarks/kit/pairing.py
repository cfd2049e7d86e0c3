"""Interleaved rounds: every contender once per round, in an order drawn anew each time."""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from benchmarks.kit.clock import Clock, Run


@dataclass(frozen=True)
class Entry:
    """A call to time.

    context: entered around each sample, outside of the clock
    seconds: of one call, where known; it is not called once more to find out
    calls: at least so many make a sample
    """

    run: Run
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    seconds: float | None = None
    calls: int = 1


@dataclass(frozen=True)
class Rounds:
    """How long to measure: rounds until ``budget`` seconds are spent, within these numbers."""

    budget: float
    least: int
    most: int


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one sample per round; ``calls`` of each contender make one sample."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]


def paired_samples(
    entries: Mapping[str, Entry],
    clock: Clock,
    rounds: Rounds,
    now: Callable[[], float] = time.monotonic,
) -> Samples:
    """Time all entries, already warm, in interleaved rounds.

    Contenders share whatever the machine does during a round, so ratios within a round say more
    than two medians. The order is drawn for each round, the same ones every time: nobody always
    follows the same one, whose memory and cache it would find.
    """
    calls = {name: _calls_per_sample(entry, clock) for name, entry in entries.items()}
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    order = list(entries)
    shuffle = random.Random(0).shuffle
    start = now()
    with _no_collection():
        for done in range(rounds.most):
            if done >= rounds.least and now() - start >= rounds.budget:
                break
            shuffle(order)
            for name in order:
                with entries[name].context():
                    seconds[name].append(clock.sample(entries[name].run, calls[name]))
    return Samples(seconds, calls)


def _calls_per_sample(entry: Entry, clock: Clock) -> int:
    once = entry.seconds
    if once is None:
        with entry.context():
            once = clock.sample(entry.run, 1)
    return max(entry.calls, math.ceil(clock.min_sample_seconds / max(once, 1e-7)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """A pass of the garbage collector would be charged to whoever is being timed."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
