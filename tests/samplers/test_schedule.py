"""Noise schedules against diffusers, published values and their own laws."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hunyuan_fast.samplers import (
    default_shift,
    linear_quadratic_sigmas,
    shift_sigmas,
    shifted_sigmas,
    timesteps,
)

PUBLISHED_TIMESTEPS = [
    (50, 7.0, [1000, 997.0930, 994.0829, 990.9639], [308.8235, 225.8064, 125.0]),
    (10, 17.0, [1000, 993.5065, 985.5073, 975.4098], [809.5239, 653.8462]),
]


@pytest.mark.parametrize(("num_steps", "shift", "first", "last"), PUBLISHED_TIMESTEPS)
def test_published_timesteps(
    num_steps: int, shift: float, first: list[float], last: list[float]
) -> None:
    got = timesteps(shifted_sigmas(num_steps, shift))
    assert got.dtype == torch.float32 and got.shape == (num_steps,)
    torch.testing.assert_close(got[: len(first)], torch.tensor(first), rtol=0, atol=1.5e-4)
    torch.testing.assert_close(got[-len(last) :], torch.tensor(last), rtol=0, atol=1.5e-4)
    torch.testing.assert_close(shifted_sigmas(num_steps), shifted_sigmas(num_steps, shift))


@pytest.mark.parametrize("shift", [1.0, 2.5, 5.0, 7.0, 12.0, 17.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 30, 50, 99])
def test_shifted_sigmas_are_those_of_diffusers(num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    scheduler.set_timesteps(sigmas=even.numpy())
    got = shifted_sigmas(num_steps, shift)
    assert (got - scheduler.sigmas).abs().max() <= 1e-6
    assert (timesteps(got) - scheduler.timesteps).abs().max() <= 2e-4


@pytest.mark.parametrize("num_steps", [2, 3, 10, 11, 50])
def test_linear_quadratic_sigmas_are_those_of_diffusers(num_steps: int) -> None:
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    expected = torch.tensor([*linear_quadratic_schedule(num_steps, 0.025), 0.0])
    assert (linear_quadratic_sigmas(num_steps) - expected).abs().max() <= 1e-6


def test_linear_quadratic_sigmas_of_ten_steps() -> None:
    expected = [1, 0.995, 0.99, 0.985, 0.98, 0.975, 0.932, 0.813, 0.618, 0.347, 0]
    got = linear_quadratic_sigmas(10)
    assert (got - torch.tensor(expected)).abs().max() <= 6e-4


@given(num_steps=st.integers(1, 200), shift=st.floats(0.1, 50))
def test_shifted_sigmas_descend_from_one_to_zero(num_steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(num_steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas.shape == (num_steps + 1,)
    assert bool((sigmas.diff() < 0).all())


@given(num_steps=st.integers(2, 200), threshold=st.floats(0.001, 0.49))
def test_linear_quadratic_sigmas_descend_from_one_to_zero(num_steps: int, threshold: float) -> None:
    sigmas = linear_quadratic_sigmas(num_steps, threshold)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


@given(a=st.floats(0.2, 20), b=st.floats(0.2, 20))
def test_shifts_compose(a: float, b: float) -> None:
    sigmas = torch.linspace(0, 1, 17, dtype=torch.float64)
    torch.testing.assert_close(
        shift_sigmas(shift_sigmas(sigmas, a), b), shift_sigmas(sigmas, a * b)
    )
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, a), 1 / a), sigmas)


def test_default_shift() -> None:
    assert [default_shift(n) for n in (1, 10, 19)] == [17.0] * 3
    assert [default_shift(n) for n in (50, 51, 1000)] == [7.0] * 3
    assert default_shift(20) == pytest.approx(17.0)
    assert default_shift(35) == pytest.approx((17 * 7) ** 0.5)
    shifts = [default_shift(n) for n in range(20, 51)]
    ratios = [b / a for a, b in pairwise(shifts)]
    assert ratios == pytest.approx([(7 / 17) ** (1 / 30)] * 30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shifted_sigmas(0), "num_steps must be at least 1, got 0"),
        (lambda: default_shift(-1), "num_steps must be at least 1, got -1"),
        (lambda: shifted_sigmas(4, 0.0), "shift must be a positive finite number, got 0.0"),
        (lambda: shifted_sigmas(4, float("nan")), "shift must be a positive finite number"),
        (lambda: linear_quadratic_sigmas(1), "num_steps must be at least 2, got 1"),
        (lambda: linear_quadratic_sigmas(4, 1.0), "threshold must lie between 0 and 1, got 1.0"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
