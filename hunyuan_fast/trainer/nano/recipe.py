"""Every number of the embedded model: sizes, data, schedule. Changing one makes another model."""

from dataclasses import dataclass
from typing import Any

from hunyuan_fast.trainer.loop import LoopConfig
from hunyuan_fast.trainer.nano.autoencoder import AutoencoderConfig, Phase
from hunyuan_fast.trainer.nano.transformer import DistillationConfig, FlowConfig
from hunyuan_fast.trainer.optim import OptimConfig

FRAMES, SIZE = 17, 96

VAE: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    # few groups: normalisation over (T, H, W) takes the level of a group, and a plain colour is one
    "norm_num_groups": 4,
}
TEXT: dict[str, int] = {"width": 128, "depth": 4, "heads": 4}
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 192,
    "heads_num": 3,
    "mlp_width_ratio": 4.0,
    "mm_double_blocks_depth": 3,
    "mm_single_blocks_depth": 6,
    "rope_dim_list": (16, 24, 24),
    "in_channels": VAE["latent_channels"],
    "out_channels": VAE["latent_channels"],
    "text_states_dim": TEXT["width"],
    "text_states_dim_2": TEXT["width"],
}


@dataclass(frozen=True, kw_only=True)
class NanoRecipe:
    """Length and batch of every stage.

    seed: of weights, data and noise
    threads: CPU threads, part of what makes a run repeat bit for bit
    device: "cpu" or "cuda"    num_clips, num_images: scenes encoded once for the transformer
    trial_prompts: held-out prompts that the finished model is tried on; 0 for none
    vae_checkpointing: whether the VAE's blocks run again in backward, for less memory
    """

    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    vae_image_steps: int = 700
    vae_short_steps: int = 500
    vae_full_steps: int = 260
    vae_checkpointing: bool = False
    num_clips: int = 6144
    num_images: int = 8192
    llm_steps: int = 300
    clip_steps: int = 1200
    dit_image_steps: int = 2500
    dit_clip_steps: int = 4300
    guidance_steps: int = 500
    text_batch: int = 128
    trial_prompts: int = 72
    save_every: int = 250

    def autoencoder(self) -> tuple[AutoencoderConfig, LoopConfig]:
        config = AutoencoderConfig(
            phases=(
                Phase(steps=self.vae_image_steps, frames=1, size=SIZE, batch=8),
                Phase(steps=self.vae_short_steps, frames=9, size=SIZE, batch=2),
                Phase(steps=self.vae_full_steps, frames=FRAMES, size=SIZE, batch=2),
            ),
            clip_frames=FRAMES,
            clip_size=SIZE,
            gradient_checkpointing=self.vae_checkpointing,
        )
        steps = sum(phase.steps for phase in config.phases)
        return config, self._loop(
            steps, OptimConfig(lr=1e-3, muon_lr=4e-3), ema_decay=0.99, warmup=50
        )

    def text(self, steps: int) -> LoopConfig:
        return self._loop(steps, OptimConfig(lr=2e-3), ema_decay=0.98, warmup=50)

    def flow(self) -> tuple[FlowConfig, LoopConfig]:
        config = FlowConfig(image_steps=self.dit_image_steps, clip_steps=self.dit_clip_steps)
        steps = config.image_steps + config.clip_steps
        return config, self._loop(
            steps, OptimConfig(lr=1e-3, muon_lr=3e-3), ema_decay=0.999, warmup=100
        )

    def distillation(self) -> tuple[DistillationConfig, LoopConfig]:
        config = DistillationConfig(steps=self.guidance_steps)
        return config, self._loop(
            config.steps, OptimConfig(lr=3e-4, muon_lr=5e-4), ema_decay=0.99, warmup=30
        )

    def _loop(self, steps: int, optim: OptimConfig, *, ema_decay: float, warmup: int) -> LoopConfig:
        return LoopConfig(
            steps=steps, optim=optim, ema_decay=ema_decay, warmup=warmup, save_every=self.save_every
        )


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How prompts are framed for the miniature: no chat skeleton, [BOS] cropped, [EOT] kept."""

    template: str = "{}"
    crop_start: int = 1
    max_length: int = 40
    skip_layer: int = 2
    clip_max_length: int = 42
