"""Text guidance: the scale embedded into a distilled model, and true classifier-free guidance."""

import torch
from torch import Tensor

GUIDANCE_SCALE_FACTOR = 1000.0


def embedded_guidance(
    scale: float, batch: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Guidance input (B,) of a distilled model: 1000 * scale, rounded twice to the model's dtype.

    The released weights were made and are used with the scale cast to the model's dtype before the
    multiplication, so in bfloat16 a scale of 6 enters as 6016 and 3 as 3008, while 1, 2, 4 and 8
    are exact. Both roundings are kept, since the model is conditioned on what it saw (technical
    report, section 5.2).
    """
    return torch.full((batch,), scale, dtype=dtype, device=device) * GUIDANCE_SCALE_FACTOR


def classifier_free(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Guided velocity negative + scale * (positive - negative), in float32.

    negative, positive: velocities of the same shape    returns: float32
    scale 1 gives the positive velocity, larger scales move further away from the negative prompt.
    """
    negative = negative.float()
    return torch.lerp(negative, positive.float(), scale)
