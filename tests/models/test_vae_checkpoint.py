"""The real configuration: names, shapes and sizes; the same folder read by diffusers."""

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.checkpoint import config_from_diffusers, config_to_diffusers, rules
from hunyuan_fast.models.vae.config import VAEConfig
from tests.models.vae_cases import TINY, clip, tiny_vae


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_released_model_has_the_official_names_and_sizes():
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        ours, theirs = HunyuanVideoVAE(), AutoencoderKLHunyuanVideo()
    assert shapes(ours) == shapes(theirs)
    assert len(ours.state_dict()) == 248
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in ours.named_children()
    }
    assert count["encoder"] == 100_341_408
    assert count["decoder"] == 146_136_067
    assert sum(count.values()) == 246_478_803


@pytest.mark.parametrize("config", [VAEConfig(), VAEConfig(**TINY)], ids=["released", "tiny"])
def test_rules_name_every_parameter_once(config):
    with torch.device("meta"):
        state = HunyuanVideoVAE.from_config(config).state_dict()
    found = rules(config)
    assert sorted(rule.native for rule in found) == sorted(state)
    for rule in found:
        assert rule.diffusers == (rule.native,)
        assert rule.rows == (state[rule.native].shape[0],)
        assert not rule.swap_halves


def test_config_goes_through_diffusers_and_back():
    from diffusers import AutoencoderKLHunyuanVideo

    config = VAEConfig(**TINY, scaling_factor=0.25, mid_block_add_attention=False)
    settings = config_to_diffusers(config)
    assert config_from_diffusers(settings) == config
    assert config_from_diffusers({}) == VAEConfig()
    del settings["_class_name"]
    with torch.device("meta"):
        theirs = AutoencoderKLHunyuanVideo(**settings)
    assert config_from_diffusers(theirs.config) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "_class_name must be AutoencoderKLHunyuanVideo"),
        ({"act_fn": "relu"}, "act_fn must be 'silu', got 'relu'"),
        ({"up_block_types": ["UpBlock"]}, "up_block_types must name HunyuanVideoUpBlock3D only"),
        ({"block_out_channels": [30]}, "block_out_channels must be multiples"),
    ],
)
def test_settings_without_counterpart(settings, message):
    with pytest.raises(ValueError, match=message):
        config_from_diffusers(settings)


def test_diffusers_reads_what_we_write(generator, tmp_path):
    from diffusers import AutoencoderKLHunyuanVideo

    vae = tiny_vae(generator)
    vae.save_pretrained(tmp_path / "vae", layout="diffusers")
    twin = AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "vae")
    again = HunyuanVideoVAE.from_pretrained(tmp_path / "vae")
    assert again.config == vae.config
    for name, tensor in vae.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        video = clip(generator, 1, 3, 1, 16, 16)
        assert torch.equal(again.encode(video).mean, vae.encode(video).mean)
