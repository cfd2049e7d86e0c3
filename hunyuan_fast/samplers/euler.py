"""Euler integration of the probability-flow ODE in float32."""

from collections.abc import Callable

from torch import Tensor

from hunyuan_fast.samplers.schedule import timesteps


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step x + velocity * (next_sigma - sigma), always in float32.

    x, velocity: same shape, any floating dtype    sigma, next_sigma: scalars or broadcastable
    returns: float32
    """
    dsigma = next_sigma.float() - sigma.float()
    return x.float() + velocity.float() * dsigma


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk x down the noise levels with Euler steps; x stays float32 from step to step.

    velocity(x, timestep) takes x float32 (B, ...) and timestep float32 (B,) in [0, 1000] and
    returns the velocity.
    x: noise (B, ...) at sigmas[0]    sigmas: (num_steps + 1,) descending    returns: float32 like x
    on_step(step, velocity, x) is called after each step with the step's index, its velocity and its
    result.
    Raises ValueError unless sigmas descend strictly.
    """
    if sigmas.dim() != 1 or len(sigmas) < 2 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"sigmas must be at least two strictly descending noise levels, got {sigmas.tolist()}"
        )
    sigmas = sigmas.to(x.device)
    x = x.float()
    for step, timestep in enumerate(timesteps(sigmas)):
        v = velocity(x, timestep.expand(x.shape[0]).contiguous())
        x = euler_step(x, v, sigmas[step], sigmas[step + 1])
        if on_step is not None:
            on_step(step, v, x)
    return x
