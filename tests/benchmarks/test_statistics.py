"""Medians, quartiles and ratios of paired samples."""

import pytest

from benchmarks.kit.statistics import Spread, geometric_mean, paired_ratio, spread


def test_the_median_ignores_a_disturbed_sample():
    assert spread([1.0, 1.0, 1.0, 1.0, 100.0]) == Spread(1.0, 1.0, 1.0)


def test_quartiles_stand_around_the_median():
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_one_sample_is_its_own_spread():
    assert spread([0.5]) == Spread(0.5, 0.5, 0.5)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        spread([])
    with pytest.raises(ValueError, match="must not be empty"):
        geometric_mean([])


def test_ratios_are_taken_within_rounds():
    # Each round is slower than the last, by the same factor for both.
    slow, fast = [2.0, 6.0, 20.0], [1.0, 3.0, 10.0]
    assert paired_ratio(slow, fast) == Spread(2.0, 2.0, 2.0)
    # The ratio of the medians would be 1 here; two rounds of three say 0.1 and 10.
    assert paired_ratio([1.0, 10.0, 5.0], [10.0, 1.0, 5.0]) == Spread(1.0, 0.55, 5.5)


def test_rounds_must_pair():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


def test_opposite_ratios_cancel():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
