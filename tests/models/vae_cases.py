"""A miniature VAE with weights that leave nothing trivial, and the same model in diffusers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae import planner
from hunyuan_fast.models.vae.checkpoint import config_to_diffusers
from hunyuan_fast.models.vae.tiling import Tiling

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def tiny_vae(generator: torch.Generator, **changes: Any) -> HunyuanVideoVAE:
    """A miniature VAE whose norms scale and shift and whose attention is sharp."""
    vae = HunyuanVideoVAE(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                gain = 4 if "to_q" in name or "to_k" in name else 1
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
    return vae


def released_vae(generator: torch.Generator) -> HunyuanVideoVAE:
    """The released architecture; activations and what comes out are of the order of one."""
    with torch.device("meta"):
        vae = HunyuanVideoVAE()
    vae = vae.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in vae.named_parameters():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        gain = 3 if "to_q" in name or "to_k" in name else 1  # a sharp attention
        spread = 0.2 if parameter.dim() == 1 else gain * parameter[0].numel() ** -0.5
        parameter.normal_(center, spread, generator=generator)
    return vae


def diffusers_twin(vae: HunyuanVideoVAE) -> Any:
    """diffusers' class with the same weights, in the same memory, whole clips at a time."""
    from diffusers import AutoencoderKLHunyuanVideo

    settings = config_to_diffusers(vae.config)
    del settings["_class_name"]
    with torch.device("meta"):
        twin = AutoencoderKLHunyuanVideo(**settings)
    twin.load_state_dict(vae.state_dict(), strict=True, assign=True)
    twin.use_framewise_encoding = twin.use_framewise_decoding = twin.use_tiling = False
    return twin


def tile_twin(twin: Any, tiling: Tiling) -> None:
    """Make diffusers' class cut the same windows."""
    twin.enable_tiling(
        tile_sample_min_height=tiling.size,
        tile_sample_min_width=tiling.size,
        tile_sample_min_num_frames=tiling.frames,
        tile_sample_stride_height=tiling.size_stride,
        tile_sample_stride_width=tiling.size_stride,
        tile_sample_stride_num_frames=tiling.frames_stride,
    )
    twin.use_framewise_encoding = twin.use_framewise_decoding = True


def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans go in chunks, also where the plain pass fits, as it does for most small clips."""
    monkeypatch.setattr(planner._Planner, "_whole", lambda *_: 1 << 62)


def clip(generator: torch.Generator, *shape: int) -> Tensor:
    """A clip of noise in [-1, 1]."""
    return 2 * torch.rand(shape, generator=generator) - 1
