"""Tiny models in every layout on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from hunyuan_fast.modules.fp8 import quantize_fp8
from tests.models.dit_cases import tiny_model

OFFICIAL_DIT = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
OFFICIAL_VAE = "hunyuan-video-t2v-720p/vae/pytorch_model.pt"

# A head of 128 features, the only size whose split over (T, H, W) is known without a config.
RELEASED_HEAD: dict[str, Any] = {
    "hidden_size": 128,
    "heads_num": 1,
    "rope_dim_list": (16, 56, 56),
    "mm_double_blocks_depth": 1,
    "mm_single_blocks_depth": 1,
}


def random_transformer(generator: torch.Generator, **changes: Any) -> HunyuanVideoTransformer:
    """A transformer in evaluation mode in which every parameter is random."""
    return tiny_model(generator, **changes).eval()


def random_vae(generator: torch.Generator, **changes: Any) -> HunyuanVideoVAE:
    """A VAE in evaluation mode in which every parameter is random."""
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    model = HunyuanVideoVAE(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Same names, same dtypes, same bits."""
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(bits(a[name]), bits(b[name])), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_official_transformer(
    model: nn.Module, root: Path, *, wrapper: str | None = "module"
) -> Path:
    """The official file of a transformer in the official pipeline folder `root`."""
    file = root / OFFICIAL_DIT
    file.parent.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    torch.save({wrapper: state} if wrapper else state, file)
    return file


def write_official_vae(model: HunyuanVideoVAE, root: Path, *, prefix: str = "vae.") -> Path:
    """The official file and config.json of a VAE in the official pipeline folder `root`."""
    file = root / OFFICIAL_VAE
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    if prefix:
        state["loss.logvar"] = torch.zeros(())
    torch.save({"state_dict": state}, file)
    config = model.config
    settings = {
        "_class_name": "AutoencoderKLCausal3D",
        "act_fn": "silu",
        "sample_size": 256,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "time_compression_ratio": config.temporal_compression_ratio,
        "spatial_compression_ratio": config.spatial_compression_ratio,
        "mid_block_add_attention": config.mid_block_add_attention,
    }
    file.with_name("config.json").write_text(json.dumps(settings))
    return file


def write_official_fp8(model: nn.Module, folder: Path) -> tuple[Path, Path]:
    """The official fp8 pair, weights and map, of a transformer: block layers in e4m3, rest bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {k: v.bfloat16() for k, v in model.state_dict().items()}
    scales: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("double_blocks" in name or "single_blocks" in name):
            state[f"{name}.weight"], scales[name] = quantize_fp8(module.weight)
    weights = folder / "mp_rank_00_model_states_fp8.pt"
    torch.save({"module": state}, weights)
    torch.save(scales, folder / "mp_rank_00_model_states_fp8_map.pt")
    return weights, folder / "mp_rank_00_model_states_fp8_map.pt"
