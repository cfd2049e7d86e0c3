"""Inputs and sizes that do not fit are refused by name; other floating dtypes are taken."""

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.dit.config import TransformerConfig
from tests.models.dit_cases import TINY, tiny_inputs, tiny_model

SHAPES = [
    ("latents", (2, 4, 4, 6), r"latents must be \(B, 4, T, H, W\), got \(2, 4, 4, 6\)"),
    ("latents", (2, 5, 3, 4, 6), r"latents must be \(B, 4, T, H, W\)"),
    ("latents", (2, 4, 3, 5, 6), "latents must have H a positive multiple .* 2, got H = 5"),
    ("latents", (2, 4, 3, 4, 7), "latents must have W a positive multiple .* 2, got W = 7"),
    ("latents", (2, 4, 0, 4, 6), "latents must have T a positive multiple .* 1, got T = 0"),
    ("timestep", (), r"timestep must have the shape \(2,\), got \(\)"),
    ("timestep", (1,), r"timestep must have the shape \(2,\)"),
    ("text_states", (2, 20), r"text_states must be \(B, L, 20\) .*, got \(2, 20\)"),
    ("text_states", (2, 0, 20), r"text_states must be .* L at least 1, got \(2, 0, 20\)"),
    ("text_states", (2, 7, 21), r"text_states must have the shape \(2, 7, 20\), got \(2, 7, 21\)"),
    ("text_states", (1, 7, 20), r"text_states must have the shape \(2, 7, 20\)"),
    ("pooled_text", (2, 13), r"pooled_text must have the shape \(2, 12\), got \(2, 13\)"),
    ("guidance", (1,), r"guidance must have the shape \(2,\), got \(1,\)"),
]


@pytest.mark.parametrize(("name", "shape", "message"), SHAPES)
def test_wrong_shapes(generator, name, shape, message):
    inputs = tiny_inputs(generator)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        tiny_model(generator)(**inputs)


def test_wrong_mask_shape(generator):
    inputs = {**tiny_inputs(generator), "text_mask": torch.ones(2, 6, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"text_mask must have the shape \(2, 7\), got \(2, 6\)"):
        tiny_model(generator)(**inputs)


def test_missing_guidance(generator):
    inputs = {**tiny_inputs(generator), "guidance": None}
    with pytest.raises(ValueError, match=r"guidance must be a \(B,\) tensor"):
        tiny_model(generator)(**inputs)


def test_guidance_is_ignored_by_a_model_without_it(generator):
    model = tiny_model(generator, guidance_embed=False)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**{**inputs, "guidance": None}))


@pytest.mark.parametrize("name", ["latents", "timestep", "text_states", "pooled_text", "guidance"])
def test_integers_where_numbers_are_wanted(generator, name):
    inputs = tiny_inputs(generator)
    inputs[name] = inputs[name].long()
    with pytest.raises(TypeError, match=f"{name} must be floating point, got torch.int64"):
        tiny_model(generator)(**inputs)


def test_additive_masks_are_refused(generator):
    inputs = tiny_inputs(generator)
    inputs["text_mask"] = inputs["text_mask"].float()
    with pytest.raises(TypeError, match="text_mask must be bool or integers"):
        tiny_model(generator)(**inputs)


@pytest.mark.parametrize("name", ["timestep", "text_mask", "guidance"])
def test_other_devices(generator, name):
    inputs = tiny_inputs(generator)
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on cpu like latents, got meta"):
        tiny_model(generator)(**inputs)


def test_mixed_dtypes_are_taken(generator):
    model = tiny_model(generator).bfloat16()
    inputs = tiny_inputs(generator)
    inputs["text_states"] = inputs["text_states"].half()
    inputs["pooled_text"] = inputs["pooled_text"].half()
    with torch.no_grad():
        velocity = model(**inputs)
    assert velocity.dtype == torch.bfloat16
    assert velocity.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_num": 5}, "hidden_size must be a multiple of heads_num = 5, got 48"),
        ({"rope_dim_list": (4, 8, 8)}, "rope_dim_list must be even numbers with the sum .* 24"),
        ({"rope_dim_list": (3, 9, 12)}, "rope_dim_list must be even numbers"),
        ({"rope_dim_list": (12, 12)}, "rope_dim_list must be three positive integers"),
        ({"patch_size": (0, 2, 2)}, "patch_size must be three positive integers"),
        ({"mm_single_blocks_depth": -1}, "mm_single_blocks_depth must be .*, got -1"),
        ({"in_channels": 0}, "in_channels must be .*, got 0"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**TINY, **changes})


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="num_heads"):
        HunyuanVideoTransformer(num_heads=3)


def test_lists_from_json_become_tuples():
    config = TransformerConfig(rope_dim_list=[16, 56, 56], patch_size=[1, 2, 2])
    assert config == TransformerConfig()
    assert hash(config) == hash(TransformerConfig())
