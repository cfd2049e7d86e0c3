"""Text encoders against transformers' own hidden states and diffusers' way of calling them."""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_fast.models.text import (
    CLIPTextEncoder,
    LLMTextEncoder,
    PromptTemplate,
    installed_template,
)
from hunyuan_fast.models.text.tokens import PromptTruncationWarning
from hunyuan_fast.models.weights import CheckpointError
from tests.kit.text import TEMPLATE, byte_tokenizer, tiny_clip, tiny_llama

PROMPTS = ["a red circle", "", "two blue squares"]
OFFICIAL_TEMPLATE_SHA256 = "a52f68dde3637b127592fffe9e2483a5d0563987a49db6ddb9b06146f2ba7cb5"


@pytest.fixture(scope="module")
def llm() -> LLMTextEncoder:
    tokenizer = byte_tokenizer(closes=False)
    return LLMTextEncoder(tiny_llama(tokenizer), tokenizer, TEMPLATE)


@pytest.fixture(scope="module")
def clip() -> CLIPTextEncoder:
    tokenizer = byte_tokenizer(closes=True)
    return CLIPTextEncoder(tiny_clip(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def diffusers_pipeline(llm: LLMTextEncoder, clip: CLIPTextEncoder) -> Any:
    """diffusers' pipeline with the text encoders only."""
    from diffusers import HunyuanVideoPipeline

    return HunyuanVideoPipeline(
        llm.model, llm.tokenizer, None, None, None, clip.model, clip.tokenizer
    )


def encode_with_diffusers(pipeline: Any, prompts: list[str]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt(
            prompts,
            prompt_template={"template": TEMPLATE.template, "crop_start": TEMPLATE.crop_start},
            device=torch.device("cpu"),
            max_sequence_length=TEMPLATE.max_length,
        )
    return states, pooled, mask.bool()


def test_template_of_diffusers_is_the_official_one() -> None:
    template = installed_template()
    digest = hashlib.sha256(template.template.encode()).hexdigest()
    assert (digest, len(template.template)) == (OFFICIAL_TEMPLATE_SHA256, 512)
    assert (template.crop_start, template.max_length) == (95, 256)


def test_states_are_those_of_diffusers(llm: LLMTextEncoder, diffusers_pipeline: Any) -> None:
    states, mask = llm.encode(PROMPTS)
    expected, _, expected_mask = encode_with_diffusers(diffusers_pipeline, PROMPTS)
    assert states.shape == (3, TEMPLATE.max_length, 32) and mask.dtype == torch.bool
    assert torch.equal(mask, expected_mask)
    # the prompt's bytes and the closing token
    assert mask.sum(1).tolist() == [len(prompt) + 1 for prompt in PROMPTS]
    assert (states[mask] - expected[mask]).abs().max() <= 2e-6
    assert bool((states[~mask] == 0).all())


def test_pooled_vector_is_that_of_diffusers(clip: CLIPTextEncoder, diffusers_pipeline: Any) -> None:
    _, expected, _ = encode_with_diffusers(diffusers_pipeline, PROMPTS)
    got = clip.encode(PROMPTS)
    assert got.shape == (3, 24)
    assert (got - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("skip_layer", [0, 1, 2, 3])
def test_skipped_layers_are_those_of_hidden_states(skip_layer: int) -> None:
    tokenizer = byte_tokenizer(closes=False)
    model = tiny_llama(tokenizer, seed=3)
    encoder = LLMTextEncoder(model, tokenizer, TEMPLATE, skip_layer)
    states, mask = encoder.encode(["a star"])
    ids = tokenizer(TEMPLATE.fill("a star"), return_tensors="pt").input_ids
    with torch.no_grad():
        every = model(ids, output_hidden_states=True).hidden_states
    expected = every[-1 - skip_layer][:, TEMPLATE.crop_start :]
    assert (states[mask] - expected[0]).abs().max() <= 2e-6


def test_only_the_layers_needed_are_run(llm: LLMTextEncoder) -> None:
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(llm.model.layers)
    ]
    llm.encode(["a star"])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]
    assert len(llm.model.layers) == 4 and llm.model.config.num_hidden_layers == 4


def test_batch_equals_single_prompts(llm: LLMTextEncoder, clip: CLIPTextEncoder) -> None:
    states, mask = llm.encode(PROMPTS)
    pooled = clip.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        one, one_mask = llm.encode([prompt])
        assert torch.equal(one_mask[0], mask[index])
        assert (one[0] - states[index]).abs().max() <= 1e-6
        assert (clip.encode([prompt])[0] - pooled[index]).abs().max() <= 1e-6


def test_white_space_around_a_prompt_is_removed(llm: LLMTextEncoder, clip: CLIPTextEncoder) -> None:
    assert torch.equal(llm.encode(["\n a star \t"])[0], llm.encode(["a star"])[0])
    assert torch.equal(clip.encode(["\n a star \t"]), clip.encode(["a star"]))


def test_braces_in_a_prompt_are_kept() -> None:
    template = PromptTemplate(template="show {}!", crop_start=0)
    assert template.fill("{} and {0} and {name}") == "show {} and {0} and {name}!"


def test_long_prompt_is_cut_with_a_warning_that_shows_the_rest(
    llm: LLMTextEncoder, clip: CLIPTextEncoder, diffusers_pipeline: Any
) -> None:
    prompt = "a circle that moves slowly to the right, then leaves; " + "x" * 30
    with pytest.warns(PromptTruncationWarning) as caught:
        states, mask = llm.encode([prompt])
        pooled = clip.encode([prompt])
    messages = [str(warning.message) for warning in caught]
    assert messages[0].startswith("prompt too long for the language model: it reads 32 tokens")
    assert repr(prompt[32:]) in messages[0]
    assert messages[1].startswith("prompt too long for the CLIP text model: it reads 77 tokens")
    assert repr(prompt[75:]) in messages[1]

    expected, expected_pooled, expected_mask = encode_with_diffusers(diffusers_pipeline, [prompt])
    assert torch.equal(mask, expected_mask) and bool(mask.all())
    assert (states - expected).abs().max() <= 2e-6
    assert (pooled - expected_pooled).abs().max() <= 2e-6


def test_a_very_long_cut_is_shortened_in_the_warning(llm: LLMTextEncoder) -> None:
    with pytest.warns(PromptTruncationWarning) as caught:
        llm.encode(["y" * 5000])
    assert len(str(caught[0].message)) < 400 and "ignores the last 4969" in str(caught[0].message)


def test_prompt_that_just_fits_is_not_warned_about(
    llm: LLMTextEncoder, clip: CLIPTextEncoder
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, mask = llm.encode(["x" * 31])
        clip.encode(["x" * 75])
    assert bool(mask.all())


def test_another_template_for_one_call(llm: LLMTextEncoder) -> None:
    image = PromptTemplate(template="{}<|end|>", crop_start=1, max_length=40)
    states, mask = llm.encode(["a star"], image)
    assert states.shape == (1, 40, 32) and mask.sum().item() == len("a star") + 1
    assert llm.encode(["a star"])[0].shape == (1, 32, 32)


def test_language_model_inside_a_whole_llava_is_found(llm: LLMTextEncoder, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    whole = LlavaForConditionalGeneration(
        LlavaConfig(text_config=llm.model.config, vision_config=vision, image_token_index=3)
    )
    whole.model.language_model.load_state_dict(llm.model.state_dict())
    whole.save_pretrained(tmp_path / "llava")
    llm.tokenizer.save_pretrained(tmp_path / "llava")
    again = LLMTextEncoder.from_pretrained(tmp_path / "llava", tmp_path / "llava", TEMPLATE)
    assert type(again.model).__name__ == "LlamaModel"
    assert torch.equal(again.encode(PROMPTS)[0], llm.encode(PROMPTS)[0])

    damage_depth(tmp_path / "llava")
    with pytest.raises(CheckpointError, match=r"the first is language_model\.layers\.3\.input"):
        LLMTextEncoder.from_pretrained(tmp_path / "llava", tmp_path / "llava", TEMPLATE)


def test_round_trip_through_folders(
    llm: LLMTextEncoder, clip: CLIPTextEncoder, tmp_path: Path
) -> None:
    llm.save_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer")
    clip.save_pretrained(tmp_path / "text_encoder_2", tmp_path / "tokenizer_2")
    again = LLMTextEncoder.from_pretrained(
        tmp_path / "text_encoder", tmp_path / "tokenizer", TEMPLATE
    )
    clip_again = CLIPTextEncoder.from_pretrained(
        tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    )
    assert torch.equal(again.encode(PROMPTS)[0], llm.encode(PROMPTS)[0])
    assert torch.equal(clip_again.encode(PROMPTS), clip.encode(PROMPTS))
    half = CLIPTextEncoder.from_pretrained(
        tmp_path / "text_encoder_2", tmp_path / "tokenizer_2", dtype=torch.bfloat16
    )
    assert half.encode(PROMPTS).dtype == torch.bfloat16


def test_text_model_inside_a_whole_clip_is_found(clip: CLIPTextEncoder, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    whole = CLIPModel(
        CLIPConfig(text_config=clip.model.config.to_dict(), vision_config=vision.to_dict())
    )
    whole.text_model.load_state_dict(clip.model.state_dict())
    whole.save_pretrained(tmp_path / "clip")
    clip.tokenizer.save_pretrained(tmp_path / "clip")
    again = CLIPTextEncoder.from_pretrained(tmp_path / "clip", tmp_path / "clip")
    assert torch.equal(again.encode(PROMPTS), clip.encode(PROMPTS))

    damage_depth(tmp_path / "clip")
    with pytest.raises(CheckpointError, match=r"the first is encoder\.layers\.\d\."):
        CLIPTextEncoder.from_pretrained(tmp_path / "clip", tmp_path / "clip")


def damage_remove_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def damage_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def damage_depth(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] -= 1
    if text.get("layer_types"):
        text["layer_types"].pop()
    (folder / "config.json").write_text(json.dumps(config))


def damage_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_remove_weight, "layers.1.mlp.up_proj.weight"),
        (damage_shape, "mlp"),
        (damage_truncate, "cannot be loaded"),
        (damage_config, "cannot be loaded"),
        (damage_no_weights, "cannot be loaded"),
        (damage_no_config, "config.json: missing"),
        (damage_depth, "have no place .* the first is layers.3.input_layernorm.weight"),
    ],
)
def test_damaged_folder_is_refused(
    llm: LLMTextEncoder, tmp_path: Path, damage: Any, named: str
) -> None:
    llm.save_pretrained(tmp_path / "model", tmp_path / "tokenizer")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=named) as caught:
        LLMTextEncoder.from_pretrained(tmp_path / "model", tmp_path / "tokenizer", TEMPLATE)
    assert str(tmp_path / "model") in str(caught.value)


def test_missing_or_damaged_tokenizer_is_refused(llm: LLMTextEncoder, tmp_path: Path) -> None:
    llm.save_pretrained(tmp_path / "model", tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="a tokenizer is expected there"):
        LLMTextEncoder.from_pretrained(tmp_path / "model", tmp_path / "none", TEMPLATE)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded as a tokenizer"):
        LLMTextEncoder.from_pretrained(tmp_path / "model", tmp_path / "tokenizer", TEMPLATE)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(
        sys.modules, "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video", None
    )
    with pytest.raises(ImportError, match="pip install transformers"):
        CLIPTextEncoder.from_pretrained(tmp_path, tmp_path)
    with pytest.raises(ImportError, match=r"pip install diffusers.*prompt_template\.json"):
        installed_template()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"template": 3}, TypeError, "template must be a string, got int"),
        ({"template": "no place"}, ValueError, "placeholder {} exactly once, got 0"),
        ({"template": "{} {}"}, ValueError, "placeholder {} exactly once, got 2"),
        ({"crop_start": -1}, ValueError, "crop_start must be at least 0, got -1"),
        ({"crop_start": 1.0}, TypeError, "crop_start must be an integer, got float"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_length": True}, TypeError, "max_length must be an integer, got bool"),
    ],
)
def test_bad_template_is_refused(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PromptTemplate(**{"template": "{}", "crop_start": 0, **change})


def test_clip_as_language_model_is_refused(llm: LLMTextEncoder, clip: CLIPTextEncoder) -> None:
    with pytest.raises(TypeError, match="model must be a LlamaModel or hold one, got CLIPText"):
        LLMTextEncoder(clip.model, llm.tokenizer, TEMPLATE)


def test_crop_into_the_prompt_is_refused(llm: LLMTextEncoder) -> None:
    deep = PromptTemplate(template=TEMPLATE.template, crop_start=30)
    with pytest.raises(ValueError, match="crop_start must be at most 29"):
        LLMTextEncoder(llm.model, llm.tokenizer, deep)


def test_crop_that_keeps_some_template_is_warned_about(llm: LLMTextEncoder) -> None:
    shallow = PromptTemplate(template=TEMPLATE.template, crop_start=20)
    with pytest.warns(UserWarning, match="crop_start is 20, but with this tokenizer 29 tokens"):
        LLMTextEncoder(llm.model, llm.tokenizer, shallow)


def test_prompt_without_a_token_left_is_refused(llm: LLMTextEncoder) -> None:
    bare = PromptTemplate(template="{}", crop_start=1)
    encoder = LLMTextEncoder(llm.model, llm.tokenizer, bare)
    assert encoder.encode(["a"])[1].sum() == 1
    with pytest.raises(ValueError, match="prompt must give more than the 1 tokens that are cut"):
        encoder.encode([" "])


@pytest.mark.parametrize(("skip", "error"), [(-1, ValueError), (4, ValueError), (2.0, TypeError)])
def test_bad_skip_layer_is_refused(llm: LLMTextEncoder, skip: Any, error: type) -> None:
    with pytest.raises(error, match="skip_layer must be"):
        LLMTextEncoder(llm.model, llm.tokenizer, TEMPLATE, skip)


@pytest.mark.parametrize(("length", "error"), [(2, ValueError), (78, ValueError), (9.0, TypeError)])
def test_bad_clip_length_is_refused(clip: CLIPTextEncoder, length: Any, error: type) -> None:
    with pytest.raises(error, match="max_length must be"):
        CLIPTextEncoder(clip.model, clip.tokenizer, length)


def test_clip_with_the_tokenizer_of_the_language_model_is_refused(
    llm: LLMTextEncoder, clip: CLIPTextEncoder
) -> None:
    with pytest.raises(ValueError, match="tokenizer must close a text with its end-of-text token"):
        CLIPTextEncoder(clip.model, llm.tokenizer)
