"""Flow-matching samplers: noise schedules, Euler steps and guidance, as pure functions of tensors.

Noise level sigma runs from 1 (pure noise) to 0 (data): x_sigma = (1 - sigma) * data + sigma *
noise, and the velocity that the model predicts is noise - data.
"""

from hunyuan_fast.samplers.euler import euler_step, integrate
from hunyuan_fast.samplers.guidance import classifier_free, embedded_guidance
from hunyuan_fast.samplers.schedule import (
    default_shift,
    linear_quadratic_sigmas,
    shift_sigmas,
    shifted_sigmas,
    timesteps,
)

__all__ = [
    "classifier_free",
    "default_shift",
    "embedded_guidance",
    "euler_step",
    "integrate",
    "linear_quadratic_sigmas",
    "shift_sigmas",
    "shifted_sigmas",
    "timesteps",
]
