"""Noise schedules: the model's shifted one and the linear-quadratic one for comparison.

A schedule is a descending float32 tensor of num_steps + 1 noise levels, the first exactly 1 and the
last exactly 0.
"""

import math

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0

# Technical report, section 5.1: shift 7 with 50 steps, 17 with fewer than 20.
SHIFT_FEW_STEPS, FEW_STEPS = 17.0, 20
SHIFT_MANY_STEPS, MANY_STEPS = 7.0, 50


def default_shift(num_steps: int) -> float:
    """Shift for a number of steps: 17 below 20, 7 from 50 on, geometric interpolation between.

    The report (section 5.1) fixes both ends only; between them the logarithm of the shift is linear
    in the steps, which keeps the schedule continuous in the number of steps. Raises ValueError for
    fewer than one step.
    """
    _check_num_steps(num_steps, minimum=1)
    if num_steps < FEW_STEPS:
        return SHIFT_FEW_STEPS
    if num_steps >= MANY_STEPS:
        return SHIFT_MANY_STEPS
    way = (num_steps - FEW_STEPS) / (MANY_STEPS - FEW_STEPS)
    return SHIFT_FEW_STEPS * (SHIFT_MANY_STEPS / SHIFT_FEW_STEPS) ** way


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Shifted noise levels s * sigma / (1 + (s - 1) * sigma), any shape, dtype kept.

    Shifts compose by multiplication and leave 0 and 1 in place; s > 1 spends more steps at high
    noise (technical report, section 5.1). Raises ValueError unless the shift is positive and
    finite.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(
            f"shift must be a positive finite number, got {shift}; the model's own is 7 at 50 steps"
        )
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted_sigmas(num_steps: int, shift: float | None = None) -> Tensor:
    """Evenly spaced noise levels after the shift, float32 (num_steps + 1,) from 1 to 0.

    shift None takes `default_shift(num_steps)`. Raises ValueError for fewer than one step or a bad
    shift.
    """
    _check_num_steps(num_steps, minimum=1)
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift_sigmas(even, default_shift(num_steps) if shift is None else shift).float()


def linear_quadratic_sigmas(num_steps: int, threshold: float = 0.025) -> Tensor:
    """Linear-quadratic noise levels of Movie Gen, float32 (num_steps + 1,) from 1 to 0.

    The first half of the steps removes `threshold` of the noise linearly, as the first steps of a
    1000-step schedule would; the second half follows the parabola that continues value and slope
    and ends at 0. The report compares the shifted schedule with it (section 5.1). Raises ValueError
    for fewer than two steps or a threshold outside
    (0, 1).
    """
    _check_num_steps(num_steps, minimum=2)
    if not 0 < threshold < 1:
        raise ValueError(
            f"threshold must lie between 0 and 1, got {threshold}; Movie Gen uses 0.025"
        )
    num_linear = num_steps // 2
    slope = threshold / num_linear
    # Beyond the join, removed(d) = threshold + slope * d + curve * d^2 for d steps past it, and
    # removed = 1 at the end.
    num_quadratic = num_steps - num_linear
    curve = (1 - threshold - slope * num_quadratic) / num_quadratic**2
    step = torch.arange(num_steps + 1, dtype=torch.float64)
    past = (step - num_linear).clamp(min=0)
    sigmas = 1 - slope * step - curve * past**2
    sigmas[-1] = 0
    return sigmas.float()


def timesteps(sigmas: Tensor) -> Tensor:
    """Times 1000 * sigma of all noise levels but the last, float32 (num_steps,)."""
    return TIMESTEP_SCALE * sigmas[:-1].float()


def _check_num_steps(num_steps: int, minimum: int) -> None:
    if num_steps < minimum:
        raise ValueError(f"num_steps must be at least {minimum}, got {num_steps}")
