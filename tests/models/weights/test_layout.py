"""Where the parts of a pipeline are found, and how names become paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from hunyuan_fast.models.weights import CheckpointError, describe, hub
from tests.models.weights.cases import (
    RELEASED_HEAD,
    assert_same_weights,
    random_transformer,
    random_vae,
    write_official_fp8,
    write_official_transformer,
    write_official_vae,
)

TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


@pytest.mark.parametrize(
    ("layout", "settings"), [("native", "hunyuan_fast.json"), ("diffusers", "model_index.json")]
)
def test_parts_of_a_folder(tmp_path: Path, layout: str, settings: str) -> None:
    (tmp_path / settings).write_text("{}")
    for part in ("transformer", "vae", "scheduler", *TEXT):
        (tmp_path / part).mkdir()
    files = describe(tmp_path)
    assert files.layout == layout
    assert files.settings == tmp_path / settings
    for part in ("transformer", "vae", "scheduler", *TEXT):
        assert files.require(part) == tmp_path / part
    (tmp_path / "tokenizer_2").rmdir()
    with pytest.raises(CheckpointError, match=r"has no tokenizer_2 \(expected .*/tokenizer_2\)"):
        describe(tmp_path).require("tokenizer_2")


def test_parts_of_an_official_folder(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator, **RELEASED_HEAD)
    weights = write_official_transformer(model, tmp_path)
    vae = write_official_vae(random_vae(generator), tmp_path)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder_2").mkdir()
    files = describe(tmp_path)
    assert files.layout == "official"
    assert (files.transformer, files.vae) == (weights, vae)
    assert files.tokenizer == files.text_encoder == tmp_path / "text_encoder"
    assert files.tokenizer_2 == tmp_path / "text_encoder_2"
    assert files.settings is None

    quantized, _ = write_official_fp8(model, weights.parent)
    assert describe(tmp_path).transformer == weights
    weights.unlink()
    assert describe(tmp_path).transformer == quantized


def test_folders_that_are_no_pipeline(tmp_path: Path, generator: torch.Generator) -> None:
    with pytest.raises(CheckpointError, match="the folder is empty"):
        describe(tmp_path)
    random_vae(generator).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=f"one model of a pipeline.*{tmp_path}"):
        describe(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="no pipeline of a known layout"):
        describe(tmp_path)
    with pytest.raises(CheckpointError, match="a pipeline is a folder, got a file"):
        describe(tmp_path / "vae" / "config.json")
    file = write_official_transformer(random_transformer(generator), tmp_path / "official")
    with pytest.raises(CheckpointError, match=f"name the folder above it, {tmp_path / 'official'}"):
        describe(file.parents[1])


def test_unknown_names_list_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        describe("somebody/something")
    for word in ("embedded models nano", "local path", "Hugging Face repo somebody/something"):
        assert word in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        describe("not-a-repo")
    assert "Hugging Face repo" not in str(caught.value)


def test_embedded_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="embedded model 'nano' is not in this installation"):
        describe("nano")
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "hunyuan_fast.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert describe("nano").root == tmp_path / "nano"


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The hub without a network, with its cache at `cache`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_a_repo_from_the_cache(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--somebody--some.model"
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    model, vae = random_transformer(generator), random_vae(generator)
    model.save_pretrained(snapshot / "transformer", layout="diffusers")
    vae.save_pretrained(snapshot / "vae", layout="diffusers")

    assert describe("somebody/some.model").root == snapshot
    assert_same_weights(model, HunyuanVideoTransformer.from_pretrained("somebody/some.model"))
    again = HunyuanVideoVAE.from_pretrained("somebody/some.model", subfolder="vae")
    assert_same_weights(vae, again)


def test_only_what_is_needed_is_downloaded(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    random_vae(generator).save_pretrained(tmp_path / "vae")
    asked: list[list[str]] = []

    def download(repo: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    HunyuanVideoVAE.from_pretrained("somebody/something", subfolder="vae")
    assert len(asked) == 1
    keep = huggingface_hub.utils.filter_repo_objects
    names = [
        "vae/config.json",
        "vae/model.safetensors",
        "hunyuan-video-t2v-720p/vae/pytorch_model.pt",
        "transformer/model.safetensors",
        "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
    ]
    assert list(keep(names, allow_patterns=asked[0])) == names[:3]
