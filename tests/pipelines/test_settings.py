"""`hunyuan_fast.json`: written and read back, and refused when anything is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hunyuan_fast.models.text import PromptTemplate
from hunyuan_fast.models.weights import CheckpointError, PipelineFiles
from hunyuan_fast.pipelines import GenerationDefaults, PipelineSettings
from hunyuan_fast.pipelines.folder import read_settings, side_dtype
from tests.kit.text import TEMPLATE

SETTINGS = PipelineSettings(
    prompt_template=TEMPLATE,
    image_prompt_template=PromptTemplate(template="«{}»", crop_start=2, max_length=9),
    hidden_state_skip_layer=1,
    clip_max_length=40,
    generation=GenerationDefaults(height=96, width=96, num_frames=17, shift=5.0, fps=8),
)


@pytest.mark.parametrize("settings", [SETTINGS, PipelineSettings(prompt_template=TEMPLATE)])
def test_round_trip(settings: PipelineSettings, tmp_path: Path) -> None:
    settings.save(tmp_path)
    assert PipelineSettings.load(tmp_path) == settings


def test_defaults_are_those_of_the_released_model() -> None:
    values = PipelineSettings(prompt_template=TEMPLATE).to_dict()
    assert values["generation"] == {
        "height": 720,
        "width": 1280,
        "num_frames": 129,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "shift": None,
        "fps": 24,
    }
    assert (values["hidden_state_skip_layer"], values["clip_max_length"]) == (2, 77)
    assert next(iter(values)) == "format_version"


def edit(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        values = values[parent]
    values[last] = value


BAD = [
    ("format_version", 2, "format_version must be 1, got 2"),
    ("format_version", None, "format_version must be 1, got None"),
    ("format_version", True, "format_version must be 1, got True"),
    ("colour", "red", "settings has the unknown field 'colour'"),
    ("generation.colour", "red", "generation has the unknown field 'colour'"),
    ("generation.height", "96", "height must be an integer"),
    ("generation.height", 0, "height must be from 1"),
    ("generation.fps", 0, "fps must be from 1 to 240, got 0"),
    ("generation.num_inference_steps", 2.5, "num_inference_steps must be an integer"),
    ("generation.guidance_scale", None, "guidance_scale must be a number"),
    ("generation.shift", -1, "shift must be above 0"),
    ("generation", [], "generation must be a Mapping, got list"),
    ("prompt_template", None, "prompt_template must be a PromptTemplate, got NoneType"),
    ("prompt_template.template", "no place", "template must hold the placeholder"),
    ("prompt_template.crop_start", -1, "crop_start must be at least 0, got -1"),
    ("prompt_template.more", 1, "prompt_template has the unknown field 'more'"),
    ("image_prompt_template.max_length", 0, "max_length must be at least 1, got 0"),
    ("hidden_state_skip_layer", -1, "hidden_state_skip_layer must be from 0"),
    ("hidden_state_skip_layer", "2", "hidden_state_skip_layer must be an integer"),
    ("clip_max_length", 2, "clip_max_length must be from 3"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_bad_field_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    values = SETTINGS.to_dict()
    edit(values, path, value)
    (tmp_path / "hunyuan_fast.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        PipelineSettings.load(tmp_path)
    assert str(tmp_path / "hunyuan_fast.json") in str(caught.value)


@pytest.mark.parametrize(
    ("part", "field"), [("prompt_template", "crop_start"), (None, "prompt_template")]
)
def test_missing_field_is_named(part: str | None, field: str) -> None:
    values = SETTINGS.to_dict()
    del (values[part] if part else values)[field]
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        PipelineSettings.from_dict(values)


@pytest.mark.parametrize("text", ["", "[]", "{", '"text"'])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "hunyuan_fast.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"hunyuan_fast\.json"):
        PipelineSettings.load(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hunyuan_fast\.json"):
        PipelineSettings.load(tmp_path)


def foreign(root: Path, shift: float | None = None) -> PipelineFiles:
    """A folder in the layout of diffusers, with a scheduler when a shift is given."""
    scheduler = None
    if shift is not None:
        scheduler = root / "scheduler"
        scheduler.mkdir()
        (scheduler / "scheduler_config.json").write_text(json.dumps({"shift": shift}))
    return PipelineFiles(root=root, layout="diffusers", scheduler=scheduler)


def test_foreign_folder_takes_the_template_of_diffusers(tmp_path: Path) -> None:
    settings = read_settings(foreign(tmp_path, shift=7.0))
    assert settings.prompt_template.crop_start == 95
    assert settings.generation == GenerationDefaults()


def test_foreign_folder_may_bring_a_template_and_a_shift(tmp_path: Path) -> None:
    values = {"template": "<{}>", "crop_start": 1, "max_length": 8}
    (tmp_path / "prompt_template.json").write_text(json.dumps(values))
    settings = read_settings(foreign(tmp_path, shift=17.0))
    assert settings.prompt_template == PromptTemplate(**values)
    assert settings.generation.shift == 17.0
    (tmp_path / "prompt_template.json").write_text('{"template": "<{}>"}')
    with pytest.raises(CheckpointError, match=r"prompt_template\.json.*lacks .* 'crop_start'"):
        read_settings(foreign(tmp_path))


def test_data_types_beside_the_transformer() -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert side_dtype(torch.bfloat16, gpu) == torch.float16
    assert side_dtype(torch.float32, gpu) == torch.float32
    assert side_dtype(torch.bfloat16, cpu) == torch.bfloat16
