"""Euler integration against diffusers' scheduler and against a flow with a known solution."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hunyuan_fast.samplers import (
    euler_step,
    integrate,
    linear_quadratic_sigmas,
    shifted_sigmas,
    timesteps,
)

MEAN, STD = 1.5, 0.3


def gaussian_velocity(x: Tensor, timestep: Tensor) -> Tensor:
    """Exact velocity E[noise - data | x] when the data are N(MEAN, STD^2)."""
    sigma = (timestep / 1000).view(-1, *[1] * (x.dim() - 1))
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    slope = (sigma - (1 - sigma) * STD**2) / variance
    return -MEAN + slope * (x - (1 - sigma) * MEAN)


def gaussian_solution(noise: Tensor) -> Tensor:
    """Where the exact flow carries noise: quantiles are kept."""
    return MEAN + STD * noise


def test_step_is_that_of_diffusers(generator: torch.Generator) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    even = torch.linspace(1, 0, 9, dtype=torch.float64)[:-1]
    scheduler.set_timesteps(sigmas=even.numpy())
    x = expected = torch.randn(2, 4, 3, 2, 2, generator=generator)
    sigmas = shifted_sigmas(8, 7.0)
    for step, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=generator)
        expected = scheduler.step(v, t, expected, return_dict=False)[0]
        x = euler_step(x, v, sigmas[step], sigmas[step + 1])
        assert (x - expected).abs().max() <= 1e-6


def test_low_precision_velocity_is_added_in_float32(generator: torch.Generator) -> None:
    x = torch.randn(64, generator=generator)
    v = torch.randn(64, generator=generator).bfloat16()
    got = euler_step(x, v, torch.tensor(0.75), torch.tensor(0.72))
    assert got.dtype == torch.float32
    exact = x.double() + v.double() * (0.72 - 0.75)
    assert (got - exact).abs().max() <= 1e-6


def test_model_sees_float32_latents_and_timesteps() -> None:
    seen = []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x.dtype, timestep.dtype, tuple(timestep.shape), timestep[0].item()))
        return torch.ones_like(x, dtype=torch.bfloat16)

    sigmas = shifted_sigmas(5)
    out = integrate(velocity, torch.zeros(3, 2, dtype=torch.float16), sigmas)
    assert [s[:3] for s in seen] == [(torch.float32, torch.float32, (3,))] * 5
    assert [s[3] for s in seen] == timesteps(sigmas).tolist()
    # a constant velocity is integrated exactly: x(0) = x(1) - v
    torch.testing.assert_close(out, -torch.ones(3, 2))


@pytest.mark.parametrize("schedule", [shifted_sigmas, linear_quadratic_sigmas])
def test_error_against_the_exact_flow_falls_as_first_order(schedule: object) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float32)[None]
    exact = gaussian_solution(noise)

    def error(num_steps: int) -> float:
        sigmas = (
            schedule(num_steps)
            if schedule is linear_quadratic_sigmas
            else (shifted_sigmas(num_steps, 7.0))
        )
        return (integrate(gaussian_velocity, noise, sigmas) - exact).abs().max().item()

    errors = [error(n) for n in (50, 100, 200, 400)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.15), errors
    assert errors[-1] < 0.02


def test_on_step_sees_every_step_in_order() -> None:
    seen: list[tuple[int, float, float]] = []
    integrate(
        lambda x, t: torch.full_like(x, 2.0),
        torch.zeros(1, 1),
        torch.tensor([1.0, 0.5, 0.0]),
        lambda step, v, x: seen.append((step, v.item(), x.item())),
    )
    assert seen == [(0, 2.0, -1.0), (1, 2.0, -2.0)]


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, float("nan")]])
def test_sigmas_that_do_not_descend_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must be at least two strictly descending"):
        integrate(lambda x, t: x, torch.zeros(1), torch.tensor(sigmas))
