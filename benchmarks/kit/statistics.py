"""Medians and ratios of paired samples."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles of one sample or more. Raises ValueError for none."""
    if not samples:
        raise ValueError("samples must not be empty")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratios within each round, then their median: what slows a whole round cancels.

    Raises ValueError when the numbers of rounds differ.
    """
    if len(numerators) != len(denominators):
        raise ValueError(
            f"both must have one sample per round, got {len(numerators)} and {len(denominators)}"
        )
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios: 2x and 0.5x make 1x. Raises ValueError for none."""
    if not ratios:
        raise ValueError("ratios must not be empty")
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
