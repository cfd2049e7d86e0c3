"""What the transformer takes: checks that cost nothing, and text brought into one form."""

import torch
from torch import Tensor

from hunyuan_fast.models.dit.config import TransformerConfig


def check_inputs(
    config: TransformerConfig,
    latents: Tensor,
    timestep: Tensor,
    text_states: Tensor,
    text_mask: Tensor,
    pooled_text: Tensor,
    guidance: Tensor | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, where an input does not fit.

    Only shapes, dtypes and devices are looked at, so that the host never waits for the device.
    """
    if latents.dim() != 5 or latents.shape[1] != config.in_channels:
        raise ValueError(
            f"latents must be (B, {config.in_channels}, T, H, W), got {tuple(latents.shape)}"
        )
    for axis, size, patch in zip("THW", latents.shape[2:], config.patch_size, strict=True):
        if size == 0 or size % patch:
            raise ValueError(
                f"latents must have {axis} a positive multiple of the patch size {patch}, "
                f"got {axis} = {size}"
            )
    if text_states.dim() != 3 or text_states.shape[1] == 0:
        raise ValueError(
            f"text_states must be (B, L, {config.text_states_dim}) with L at least 1, "
            f"got {tuple(text_states.shape)}"
        )
    if config.guidance_embed and guidance is None:
        raise ValueError(
            "guidance must be a (B,) tensor, the guidance scale times 1000, since the model takes "
            "its guidance as an input (guidance_embed=True); got None"
        )

    batch, text_length = latents.shape[0], text_states.shape[1]
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "timestep": (timestep, (batch,)),
        "text_states": (text_states, (batch, text_length, config.text_states_dim)),
        "text_mask": (text_mask, (batch, text_length)),
        "pooled_text": (pooled_text, (batch, config.text_states_dim_2)),
    }
    if config.guidance_embed and guidance is not None:
        shapes["guidance"] = (guidance, (batch,))
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != latents.device:
            raise ValueError(
                f"{name} must be on {latents.device} like latents, got {tensor.device}"
            )
        if name != "text_mask" and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not latents.is_floating_point():
        raise TypeError(f"latents must be floating point, got {latents.dtype}")
    if text_mask.is_floating_point():
        raise TypeError(f"text_mask must be bool or integers 0 and 1, got {text_mask.dtype}")


def pack_text(text_states: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Valid tokens moved to the front in their order, zeros behind them, and their number.

    text_states: (B, L, C)    text_mask: (B, L)    returns: (B, L, C), (B,) int32

    Text has no positions in the transformer, so moving tokens changes nothing; and a mask of any
    pattern becomes a length, which is all that attention needs. The host waits for nothing.
    """
    valid = text_mask.bool()
    order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
    zeroed = text_states.masked_fill(~valid[..., None], 0)  # NaN times zero would stay NaN
    packed = zeroed.gather(1, order[..., None].expand_as(zeroed))
    return packed, valid.sum(dim=1, dtype=torch.int32)
