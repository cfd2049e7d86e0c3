"""The stage that trains the VAE."""

from unittest import mock

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.blocks import ResnetBlock
from hunyuan_fast.trainer.loop import LoopConfig, fit
from hunyuan_fast.trainer.nano import NanoRecipe
from hunyuan_fast.trainer.nano.autoencoder import AutoencoderConfig, AutoencoderStage, Phase
from hunyuan_fast.trainer.optim import OptimConfig

TINY = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
PHASES = (Phase(steps=3, frames=5, size=16, batch=2),)


def trained(folder, checkpointing):
    """The weights after a clip, an image and a clip; how often residual blocks ran, and half ran
    again in backward."""
    torch.manual_seed(0)
    vae = HunyuanVideoVAE(**TINY)
    runs, halves, between = [], [], ResnetBlock._between
    for block in vae.modules():
        if isinstance(block, ResnetBlock):
            block.register_forward_pre_hook(lambda *_: runs.append(1))
    config = AutoencoderConfig(
        phases=PHASES,
        image_every=2,
        image_batch=2,
        clip_frames=5,
        clip_size=16,
        gradient_checkpointing=checkpointing,
    )
    stage = AutoencoderStage(vae, config, seed=1)
    loop = LoopConfig(steps=stage.steps, optim=OptimConfig(lr=1e-3), warmup=1)

    def counted(block, x):
        halves.append(1)
        return between(block, x)

    with mock.patch.object(ResnetBlock, "_between", counted):
        fit(stage, loop, folder)
    return vae.state_dict(), len(runs), len(halves)


def test_checkpointing_ends_in_the_same_weights(tmp_path):
    kept, *counts = trained(tmp_path / "kept", checkpointing=False)
    again, runs, halves = trained(tmp_path / "again", checkpointing=True)
    assert counts == [runs, 0] and halves == runs > 0
    for name, weight in kept.items():
        assert torch.equal(again[name], weight), name


@pytest.mark.parametrize("asked", [False, True])
def test_the_recipe_passes_it_on(asked):
    config, _ = NanoRecipe(vae_checkpointing=asked).autoencoder()
    assert config.gradient_checkpointing is asked
