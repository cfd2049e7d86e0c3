"""Names of the VAE's parameters and settings in the official and the diffusers layout."""

from collections.abc import Mapping
from typing import Any

import torch

from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.decoder import Decoder
from hunyuan_fast.models.vae.encoder import Encoder
from hunyuan_fast.models.weights.rule import Rule

CLASS_NAME = "AutoencoderKLHunyuanVideo"
# Settings of diffusers that say nothing else than this model can be.
FIXED = {"act_fn": "silu"}
_BLOCKS = {
    "down_block_types": "HunyuanVideoDownBlock3D",
    "up_block_types": "HunyuanVideoUpBlock3D",
}


def rules(config: VAEConfig) -> tuple[Rule, ...]:
    """One rule for every parameter of the model of ``config``; both layouts share every name."""
    latent = config.latent_channels
    rows = {"quant_conv": 2 * latent, "post_quant_conv": latent}
    found = [
        Rule(f"{n}.{kind}", (f"{n}.{kind}",), (r,))
        for n, r in rows.items()
        for kind in ("weight", "bias")
    ]
    with torch.device("meta"):
        halves = {"encoder": Encoder(config), "decoder": Decoder(config)}
    for half, module in halves.items():
        for name, parameter in module.named_parameters(prefix=half):
            found.append(Rule(name, (name,), (parameter.shape[0],)))
    return tuple(found)


def config_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """The settings of diffusers' AutoencoderKLHunyuanVideo that describe the same model."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": CLASS_NAME,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "spatial_compression_ratio": config.spatial_compression_ratio,
        "temporal_compression_ratio": config.temporal_compression_ratio,
        "mid_block_add_attention": config.mid_block_add_attention,
        **{name: [kind] * levels for name, kind in _BLOCKS.items()},
        **FIXED,
    }


def config_from_diffusers(settings: Mapping[str, Any]) -> VAEConfig:
    """The config that the settings in a diffusers config.json describe.

    Settings it leaves out take the values of the released model, which are diffusers' defaults.
    Raises ValueError for another class of model and for settings this model has no counterpart of.
    """
    class_name = settings.get("_class_name", CLASS_NAME)
    if class_name != CLASS_NAME:
        raise ValueError(f"_class_name must be {CLASS_NAME}, got {class_name}")
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {settings[name]!r}")
    for name, kind in _BLOCKS.items():
        if set(settings.get(name, [kind])) != {kind}:
            raise ValueError(f"{name} must name {kind} only, got {settings[name]!r}")
    base = config_to_diffusers(VAEConfig())
    ours = [name for name in base if name in VAEConfig.__dataclass_fields__]
    return VAEConfig(**{name: settings.get(name, base[name]) for name in ours})
