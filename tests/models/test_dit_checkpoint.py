"""Names in both layouts: every tensor once, lossless both ways, settings too."""

import dataclasses

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.dit.checkpoint import config_from_diffusers, config_to_diffusers, rules
from hunyuan_fast.models.dit.config import TransformerConfig
from tests.models.dit_cases import (
    diffusers_settings,
    diffusers_state,
    diffusers_twin,
    tiny_model,
    to_native,
)


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_round_trip_is_lossless(generator, guidance_embed):
    model = tiny_model(generator, guidance_embed=guidance_embed)
    state = diffusers_twin(model).state_dict()
    table = rules(model.config)

    assert sorted(name for rule in table for name in rule.diffusers) == sorted(state)
    back = {rule.native: to_native(rule, state) for rule in table}
    native = model.state_dict()
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


@pytest.mark.parametrize(
    ("guidance_embed", "native", "theirs"), [(True, 856, 1264), (False, 852, 1260)]
)
def test_full_size_names_and_shapes(guidance_embed, native, theirs):
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        model = HunyuanVideoTransformer(guidance_embed=guidance_embed)
        twin = HunyuanVideoTransformer3DModel(**diffusers_settings(model))

    table = rules(model.config)
    assert len(table) == len({rule.native for rule in table}) == native
    converted = {name: tensor.shape for name, tensor in diffusers_state(model).items()}
    assert converted == {name: tensor.shape for name, tensor in twin.state_dict().items()}
    assert len(converted) == theirs


def test_default_settings_are_those_of_diffusers():
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        settings = dict(HunyuanVideoTransformer3DModel().config)
    assert config_from_diffusers(settings) == TransformerConfig()
    assert config_from_diffusers({}) == TransformerConfig()


def test_settings_round_trip():
    config = TransformerConfig(
        hidden_size=96,
        heads_num=4,
        mlp_width_ratio=3.0,
        mm_double_blocks_depth=1,
        mm_single_blocks_depth=5,
        rope_dim_list=(4, 8, 12),
        patch_size=(2, 4, 4),
        in_channels=8,
        out_channels=6,
        text_states_dim=33,
        text_states_dim_2=17,
        guidance_embed=False,
        rope_theta=100.0,
    )
    defaults = dataclasses.asdict(TransformerConfig())
    assert all(value != defaults[name] for name, value in dataclasses.asdict(config).items())
    assert config_from_diffusers(config_to_diffusers(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name must be"),
        ({"image_condition_type": "latent_concat"}, "image_condition_type must be None"),
        ({"num_refiner_layers": 3}, "num_refiner_layers must be 2"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be 'rms_norm'"),
    ],
)
def test_foreign_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_from_diffusers(settings)


def test_patches_diffusers_cannot_express_are_refused():
    with pytest.raises(ValueError, match=r"patch_size must be square in space.*\(1, 2, 4\)"):
        config_to_diffusers(TransformerConfig(patch_size=(1, 2, 4)))
