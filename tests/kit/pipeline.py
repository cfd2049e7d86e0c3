"""A tiny text-to-video pipeline with random weights, every part of its real class."""

from __future__ import annotations

import torch

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from hunyuan_fast.models.text import CLIPTextEncoder, LLMTextEncoder
from hunyuan_fast.pipelines import GenerationDefaults, HunyuanVideoPipeline, PipelineSettings
from tests.kit.text import TEMPLATE, byte_tokenizer, tiny_clip, tiny_llama

TRANSFORMER = {
    "hidden_size": 48,
    "heads_num": 2,
    "mm_double_blocks_depth": 1,
    "mm_single_blocks_depth": 2,
    "rope_dim_list": (4, 10, 10),
    "in_channels": 4,
    "out_channels": 4,
    "text_states_dim": 32,
    "text_states_dim_2": 24,
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DEFAULTS = GenerationDefaults(height=32, width=48, num_frames=9, num_inference_steps=3, fps=8)


def randomize(module: torch.nn.Module, seed: int, std: float = 0.1) -> None:
    """Fill every parameter with noise: at their start many layers are zero and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(std * noise + (1 if "norm" in name and "weight" in name else 0))


def tiny_pipeline(seed: int = 0, guidance_embed: bool = True) -> HunyuanVideoPipeline:
    """Pipeline of a few thousand weights for clips of 9 frames of 32 x 48."""
    transformer = HunyuanVideoTransformer(**TRANSFORMER, guidance_embed=guidance_embed)
    vae = HunyuanVideoVAE(**VAE)
    randomize(transformer, seed)
    randomize(vae, seed + 1)
    open_end, closed = byte_tokenizer(closes=False), byte_tokenizer(closes=True)
    return HunyuanVideoPipeline(
        transformer,
        vae,
        LLMTextEncoder(tiny_llama(open_end, seed + 2), open_end, TEMPLATE),
        CLIPTextEncoder(tiny_clip(closed, seed + 3), closed),
        PipelineSettings(prompt_template=TEMPLATE, generation=DEFAULTS),
    )
