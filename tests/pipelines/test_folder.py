"""Folders of whole pipelines: every layout is read, and what is missing or mixed up is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from hunyuan_fast.models.vae.checkpoint import config_to_diffusers
from hunyuan_fast.models.weights import CheckpointError
from hunyuan_fast.pipelines import HunyuanVideoPipeline
from hunyuan_fast.pipelines.folder import PARTS, SEALED
from tests.kit.pipeline import TRANSFORMER, randomize, tiny_pipeline
from tests.kit.text import TEMPLATE

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "native"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(native: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(native, tmp_path / "model"))


@pytest.mark.parametrize("part", PARTS)
def test_missing_part_is_named_before_any_weight_is_read(
    copy: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heavy(*arguments: object, **options: object) -> None:
        raise AssertionError("a weight was read")

    shutil.rmtree(copy / part)
    for kind in (HunyuanVideoTransformer, HunyuanVideoVAE):
        monkeypatch.setattr(kind, "from_pretrained", heavy)
    monkeypatch.setattr("hunyuan_fast.models.text.llm.load_model", heavy)
    with pytest.raises(CheckpointError, match=f"has no {part} ") as caught:
        HunyuanVideoPipeline.from_pretrained(copy)
    assert str(copy / part) in str(caught.value)


def swap(copy: Path, one: str, other: str) -> None:
    (copy / one).rename(copy / "aside")
    (copy / other).rename(copy / one)
    (copy / "aside").rename(copy / other)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("transformer", "vae", "this is the model 'transformer' of a pipeline, expected 'vae'"),
        ("text_encoder", "text_encoder_2", "text_encoder: holds no decoder-only language model"),
        ("tokenizer", "tokenizer_2", "tokenizer must close a text with its end-of-text token"),
    ],
)
def test_swapped_parts_are_refused(copy: Path, one: str, other: str, message: str) -> None:
    swap(copy, one, other)
    with pytest.raises(ValueError, match=message):
        HunyuanVideoPipeline.from_pretrained(copy)


def test_parts_of_another_model_are_refused(copy: Path) -> None:
    other = HunyuanVideoTransformer(**{**TRANSFORMER, "text_states_dim": 16})
    shutil.rmtree(copy / "transformer")
    other.save_pretrained(copy / "transformer")
    with pytest.raises(ValueError, match=r"text_encoder must have the width .* = 16, got 32"):
        HunyuanVideoPipeline.from_pretrained(copy)


def test_template_of_another_tokenizer_is_refused(copy: Path) -> None:
    path = copy / "hunyuan_fast.json"
    values = json.loads(path.read_text())
    values["prompt_template"]["crop_start"] = 95
    path.write_text(json.dumps(values))
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="crop_start must be at most 29"):
        HunyuanVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "hunyuan_fast.json",
    ],
)
def test_flipped_bit_beside_the_models_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="wrong digest") as caught:
        HunyuanVideoPipeline.from_pretrained(copy)
    assert str(path) in str(caught.value)
    assert f"delete {path.parent / 'manifest.json'}" in str(caught.value)


def test_missing_settings_are_named(copy: Path) -> None:
    (copy / "hunyuan_fast.json").unlink()
    with pytest.raises(CheckpointError, match=r"a pipeline without its hunyuan_fast\.json"):
        HunyuanVideoPipeline.from_pretrained(copy)


def test_text_parts_without_digests_are_read(copy: Path) -> None:
    for folder in (copy, *(copy / part for part in SEALED)):
        (folder / "manifest.json").unlink()
    assert HunyuanVideoPipeline.from_pretrained(copy).dtype == torch.float32


def test_attention_precision_reaches_every_block(native: Path) -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(native, attention_precision="fp8")
    blocks = (*pipe.transformer.double_blocks, *pipe.transformer.single_blocks)
    assert {block.attention.precision for block in blocks} == {"fp8"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_data_type_reaches_every_part(native: Path, dtype: Any) -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(native, dtype=dtype)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder.model, pipe.text_encoder_2.model)
    assert all({p.dtype for p in part.parameters()} == {torch.bfloat16} for part in parts)
    assert pipe("a star", **SIZE).shape == (1, 9, 32, 48, 3)


def test_default_data_type_on_a_cpu_is_float32(native: Path, tmp_path: Path) -> None:
    HunyuanVideoPipeline.from_pretrained(native, dtype="bfloat16").save_pretrained(tmp_path / "low")
    pipe = HunyuanVideoPipeline.from_pretrained(tmp_path / "low")
    assert pipe.dtype == torch.float32
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}


def test_official_layout_is_read(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    sizes = {"hidden_size": 128, "heads_num": 1, "rope_dim_list": (16, 56, 56)}
    pipe.transformer = HunyuanVideoTransformer(**(TRANSFORMER | sizes)).eval()
    randomize(pipe.transformer, seed=9)
    weights = tmp_path / "hunyuan-video-t2v-720p"
    (weights / "transformers").mkdir(parents=True)
    (weights / "vae").mkdir()
    torch.save(
        {"module": pipe.transformer.state_dict()},
        weights / "transformers" / "mp_rank_00_model_states.pt",
    )
    torch.save({"state_dict": pipe.vae.state_dict()}, weights / "vae" / "pytorch_model.pt")
    (weights / "vae" / "config.json").write_text(json.dumps(config_to_diffusers(pipe.vae.config)))
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder", tmp_path / "text_encoder")
    pipe.text_encoder_2.save_pretrained(tmp_path / "text_encoder_2", tmp_path / "text_encoder_2")
    (tmp_path / "prompt_template.json").write_text(
        json.dumps({"template": TEMPLATE.template, "crop_start": 29, "max_length": 32})
    )

    again = HunyuanVideoPipeline.from_pretrained(tmp_path)
    assert again.settings.generation.height == 720
    assert torch.equal(again("a star", **SIZE), pipe("a star", **SIZE))
