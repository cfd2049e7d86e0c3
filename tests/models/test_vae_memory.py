"""What the VAE keeps for backward: the map before each norm; with checkpointing one a block."""

from __future__ import annotations

from math import prod

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.blocks import ResnetBlock
from tests.models.vae_memory import CLIP, call, kept_bytes, meta_clip, peak_of_training

PIXELS = prod(CLIP)
# Bytes for each pixel of a clip in bf16, of the released architecture: kept between forward and
# backward, and the most that is alive, gradients of the parameters included (262 and 180).
MOST = {
    ("decode", False): (2810, 3330),
    ("decode", True): (1735, 2765),
    ("encode", False): (2095, 2300),
    ("encode", True): (1215, 1730),
}


@pytest.mark.parametrize("channels", [(8, 8), (8, 16)], ids=str)
def test_a_block_keeps_its_input_and_the_map_between(generator, channels):
    block = ResnetBlock(*channels, num_groups=4)
    size = (2, 3, 5, 7)  # clips, frames, rows, columns
    x = torch.randn(size[0], channels[0], *size[1:], generator=generator)
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    statistics = 2 * 3 * size[0] * 4 * 8
    assert (
        kept_bytes(block, lambda: block(x)).total() == 4 * prod(size) * sum(channels) + statistics
    )


@pytest.mark.parametrize(("half", "checkpointing"), MOST)
def test_training_keeps_few_bytes_for_each_pixel(half, checkpointing):
    with torch.device("meta"):
        vae = HunyuanVideoVAE().bfloat16()
    vae.enable_gradient_checkpointing(checkpointing)
    x = meta_clip(vae, half)
    kept = kept_bytes(vae, lambda: call(vae, half, x)).total() / PIXELS
    peak = peak_of_training(vae, half, x) / PIXELS
    most_kept, most_alive = MOST[half, checkpointing]
    assert 0.95 * most_kept < kept < most_kept
    assert 0.95 * most_alive < peak < most_alive
