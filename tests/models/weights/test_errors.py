"""Every broken checkpoint gives one error that names the file and the first wrong key."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from hunyuan_fast.models.weights import CheckpointError
from hunyuan_fast.models.weights.loader import without_memory
from tests.models.weights.cases import (
    RELEASED_HEAD,
    random_transformer,
    random_vae,
    write_official_fp8,
    write_official_transformer,
    write_official_vae,
)

NATIVE, DIFFUSERS = "model", "diffusion_pytorch_model"
QKV = "double_blocks.0.img_attn_qkv.weight"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small model per layout; tests copy what they break."""
    root = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(5)
    model = random_transformer(generator, **RELEASED_HEAD)
    for layout in ("native", "diffusers"):
        model.save_pretrained(root / layout, layout=layout)
        model.save_pretrained(root / f"{layout}-sharded", layout=layout, max_shard_bytes=400_000)
    write_official_transformer(model, root / "official")
    write_official_fp8(model, root / "fp8")
    vae = random_vae(generator)
    vae.save_pretrained(root / "vae")
    vae.save_pretrained(root / "vae-diffusers", layout="diffusers")
    write_official_vae(vae, root / "official")
    return root


def copied(stored: Path, name: str, target: Path) -> Path:
    """A copy of `stored/name` that may be broken."""
    folder = target / name
    for source in (stored / name).rglob("*"):
        if source.is_file():
            copy = folder / source.relative_to(stored / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    return folder


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def refused(place: Path, *words: str, model: Any = HunyuanVideoTransformer, **options: Any) -> str:
    """The one-line error of loading `place`, which has to contain all `words`."""
    with pytest.raises(CheckpointError) as caught:
        model.from_pretrained(place, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# --- names, shapes, settings -----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_missing_and_unexpected_keys(stored: Path, tmp_path: Path, layout: str) -> None:
    folder = copied(stored, layout, tmp_path)
    key = QKV if layout == "native" else "transformer_blocks.0.attn.to_k.weight"
    file = folder / f"{NATIVE if layout == 'native' else DIFFUSERS}.safetensors"
    edit_tensors(file, lambda tensors: tensors.pop(key))
    refused(folder, str(folder), f"{key} is missing (1 of", verify=False)
    edit_tensors(
        file, lambda tensors: tensors.update({key: torch.zeros(1), "extra.w": torch.ones(2)})
    )
    refused(folder, str(file), "extra.w is unexpected", verify=False)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_wrong_shape(stored: Path, tmp_path: Path, layout: str) -> None:
    folder = copied(stored, layout, tmp_path)
    key = QKV if layout == "native" else "transformer_blocks.0.attn.to_k.weight"
    file = folder / f"{NATIVE if layout == 'native' else DIFFUSERS}.safetensors"
    edit_tensors(file, lambda tensors: tensors.update({key: torch.zeros(3, 128)}))
    rows = 384 if layout == "native" else 128
    refused(folder, str(file), f"{key} has shape (3, 128), expected ({rows}, 128)", verify=False)


def test_config_that_does_not_fit_is_found_before_memory_is_taken(
    stored: Path, tmp_path: Path
) -> None:
    """A width of a million would need terabytes."""
    folder = copied(stored, "diffusers", tmp_path)
    edit_json(folder / "config.json", lambda data: data.update(num_attention_heads=8000))
    message = refused(folder, "x_embedder.proj.weight has shape (128,", "expected (1024000,")
    assert "config.json" in message


def test_config_with_more_blocks_names_the_first_missing(stored: Path, tmp_path: Path) -> None:
    folder = copied(stored, "diffusers", tmp_path)
    edit_json(folder / "config.json", lambda data: data.update(num_layers=2))
    refused(folder, "transformer_blocks.1.norm1.linear.weight is missing")


def test_config_with_fewer_blocks_names_the_first_unexpected(stored: Path, tmp_path: Path) -> None:
    folder = copied(stored, "diffusers", tmp_path)
    edit_json(folder / "config.json", lambda data: data.update(num_single_layers=0))
    refused(folder, "single_transformer_blocks.0.", "is unexpected")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"hidden_sise": 3}}, ("config.json", "hidden_sise is not a setting")),
        ({"config": {"heads_num": 5}}, ("config.json", "heads_num")),
        ({"config": {"heads_num": "two"}}, ("config.json",)),
        ({"config": 7}, ("config.json", "under the key config")),
        ({"version": 9}, ("config.json", "version must be 1, got 9")),
        ({"format": "other"}, ("config.json", "format must be 'hunyuan-fast'")),
    ],
)
def test_wrong_native_config(
    stored: Path, tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    folder = copied(stored, "native", tmp_path)
    edit_json(folder / "config.json", lambda data: data.update(change))
    refused(folder, *words, verify=False)
    refused(folder, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", "{" * 100_000, "[" * 100_000])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_config_that_is_not_json(stored: Path, tmp_path: Path, layout: str, text: str) -> None:
    folder = copied(stored, layout, tmp_path)
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, str(folder / "config.json"))


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_missing_config(stored: Path, tmp_path: Path, layout: str) -> None:
    folder = copied(stored, layout, tmp_path)
    (folder / "config.json").unlink()
    refused(folder, str(folder / "config.json"), "no such file")


@pytest.mark.parametrize(
    "change",
    [
        {"num_single_layers": 10**9},
        {"attention_head_dim": 10**13, "num_attention_heads": 10**13},
        {"num_layers": 1.5},
        {"num_layers": None},
        {"rope_axes_dim": [2, 2, 10**30]},
        {"patch_size": -1},
        {"text_embed_dim": "many"},
        {"pooled_projection_dim": 5.0},
    ],
)
def test_settings_of_no_possible_model(
    stored: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Refused at once: neither a billion layers nor an impossible size is tried."""
    folder = copied(stored, "diffusers", tmp_path)
    edit_json(folder / "config.json", lambda data: data.update(change))
    refused(folder, "config.json")


# --- mixed-up models -------------------------------------------------------------------------


def test_mixed_up_components(stored: Path) -> None:
    vae = HunyuanVideoVAE
    refused(stored / "vae", "config.json", "model 'vae'", "expected 'transformer'")
    refused(stored / "native", "model 'transformer'", "expected 'vae'", model=vae)
    refused(stored / "vae-diffusers", "AutoencoderKLHunyuanVideo")
    refused(stored / "diffusers", "HunyuanVideoTransformer3DModel", model=vae)
    official = stored / "official" / "hunyuan-video-t2v-720p"
    refused(official / "vae" / "pytorch_model.pt", "AutoencoderKLCausal3D")
    refused(official / "transformers" / "mp_rank_00_model_states.pt", "config.json", model=vae)


def test_a_vae_file_with_no_config_is_named_as_such(stored: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((stored / "vae" / "model.safetensors").read_bytes())
    refused(file, str(file), "img_in.proj.weight", "is missing")


def test_transformer_weights_under_a_vae_config(stored: Path, tmp_path: Path) -> None:
    folder = copied(stored, "vae-diffusers", tmp_path)
    file = folder / f"{DIFFUSERS}.safetensors"
    file.write_bytes((stored / "diffusers" / file.name).read_bytes())
    words = (str(file), "a transformer in the diffusers layout", "is unexpected")
    refused(folder, *words, model=HunyuanVideoVAE)


def test_a_text_encoder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaModel"]}')
    save_file({"embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "config.json", "LlamaModel", "text encoder")


# --- missing and foreign files ---------------------------------------------------------------


def test_empty_and_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the folder is empty")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, str(tmp_path), "no model of a known layout", "notes.txt")
    refused(tmp_path / "absent", "no such model")


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_missing_weights(stored: Path, tmp_path: Path, layout: str) -> None:
    folder = copied(stored, layout, tmp_path)
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    refused(folder, str(file), "no such file")


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_missing_shard_and_missing_index(stored: Path, tmp_path: Path, layout: str) -> None:
    folder = copied(stored, f"{layout}-sharded", tmp_path)
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    key = next(iter(load_file(shard)))
    content = shard.read_bytes()
    shard.unlink()
    message = refused(folder, str(shard), "no such shard")
    assert re.search(r"expects \S+ in it", message)
    shard.write_bytes(content)
    (index,) = folder.glob("*.index.json")
    original = index.read_text()

    edit_json(
        index,
        lambda data: data["weight_map"].update({key: sorted(folder.glob("*-00001-of-*"))[0].name}),
    )
    refused(folder, key, "expects it there", verify=False)
    index.write_text(original)
    edit_json(index, lambda data: data["weight_map"].update({key: "../../secret.safetensors"}))
    refused(folder, str(index), "must be a file name in its own folder")
    edit_json(index, lambda data: data.pop("weight_map"))
    refused(folder, str(index), "weight_map")
    index.unlink()
    refused(folder, str(index), "no such file")


def test_shards_of_two_models(stored: Path, tmp_path: Path) -> None:
    folder = copied(stored, "diffusers-sharded", tmp_path)
    first, second, *_ = sorted(folder.glob("*-of-*"))
    tensors = load_file(first)
    name = next(iter(tensors))
    edit_tensors(second, lambda others: others.update({name: tensors[name]}))
    refused(folder, str(second), name, "two models")


def test_fp8_without_its_map(stored: Path, tmp_path: Path) -> None:
    folder = copied(stored, "fp8", tmp_path)
    map_file = folder / "mp_rank_00_model_states_fp8_map.pt"
    scales = torch.load(map_file, weights_only=True)
    first = next(iter(scales))

    torch.save({**scales, "elsewhere.linear": 1.0}, map_file)
    refused(folder, str(map_file), "elsewhere.linear has a scale but no")
    torch.save({**scales, first: float("nan")}, map_file)
    refused(folder, str(map_file), first, "finite scale")
    torch.save({**scales, first: "a"}, map_file)
    refused(folder, str(map_file), first, "finite scale")
    del scales[first]
    torch.save(scales, map_file)
    refused(folder, str(map_file), f"{first} has fp8 weights but no scale")
    map_file.unlink()
    refused(folder, str(map_file), "no such file")


# --- damaged and hostile files ---------------------------------------------------------------


def weights_files(stored: Path) -> list[Path]:
    official = stored / "official" / "hunyuan-video-t2v-720p" / "transformers"
    return [
        stored / "native" / "model.safetensors",
        stored / "diffusers" / f"{DIFFUSERS}.safetensors",
        official / "mp_rank_00_model_states.pt",
        stored / "fp8" / "mp_rank_00_model_states_fp8.pt",
    ]


@pytest.mark.parametrize("which", range(4))
def test_truncated_anywhere(stored: Path, tmp_path: Path, which: int) -> None:
    source = weights_files(stored)[which]
    folder = copied(stored, str(source.parent.relative_to(stored)), tmp_path)
    whole = source.read_bytes()
    draw = random.Random(which)
    lengths = [0, 1, 7, 8, 9, 100, len(whole) - 1]
    for length in lengths + [draw.randrange(len(whole)) for _ in range(30)]:
        (folder / source.name).write_bytes(whole[:length])
        refused(folder, source.name)
        refused(folder / source.name, source.name, verify=False)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("which", range(4))
def test_noise_in_the_header_never_escapes(stored: Path, tmp_path: Path, which: int) -> None:
    """Whatever bytes the header has: a model or a CheckpointError, never another exception."""
    source = weights_files(stored)[which]
    folder = copied(stored, str(source.parent.relative_to(stored)), tmp_path)
    whole = source.read_bytes()
    draw = random.Random(which)
    refusals = 0
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(draw.choice([1, 3, 30])):
            broken[draw.randrange(min(3000, len(whole)))] = draw.randrange(256)
        (folder / source.name).write_bytes(broken)
        try:
            HunyuanVideoTransformer.from_pretrained(folder, verify=False)
        except CheckpointError:
            refusals += 1
    assert refusals > 20


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_another_kind(tmp_path: Path) -> None:
    for name, content, words in [
        ("a.safetensors", b"<!DOCTYPE html><html>", "not a checkpoint"),
        ("b.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("c.pt", b"\x00" * 5000, "not a checkpoint"),
        ("d.pt", b"PK\x03\x04" + b"\x00" * 5000, "damaged"),
        ("e.safetensors", b"", "truncated"),
        ("f.pt", pickle.dumps({"a": 1}), "pickle"),
    ]:
        file = tmp_path / name
        file.write_bytes(content)
        refused(file, str(file), words)


class RunsCode:
    """Writes a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pickles_with_code_are_refused(tmp_path: Path, zipped: bool, nested: bool) -> None:
    file, marker = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "executed"
    bad = RunsCode(marker)
    content = {"module": {"a": bad}} if nested else bad
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    message = refused(file, str(file), "refused", "run code", "mkdir")
    assert "weights_only" not in message
    refused(tmp_path, str(file), "refused")
    assert not marker.exists()


def test_legacy_torch_files_are_read(tmp_path: Path, stored: Path) -> None:
    model = HunyuanVideoTransformer.from_pretrained(stored / "native")
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": model.state_dict()}, file, _use_new_zipfile_serialization=False)
    again = HunyuanVideoTransformer.from_pretrained(file)
    assert torch.equal(again.img_in.proj.weight, model.img_in.proj.weight)


def test_header_bombs(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{" + b" " * 100)
    refused(file, str(file), "header claims")

    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(60_000)}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(file, str(file), "60000 tensors")

    huge = {"t": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}}
    header = json.dumps(huge).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(file, str(file), "damaged")

    odd = {"t": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}
    header = json.dumps(odd).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    refused(file, str(file), "t has dtype I64")


def test_archive_bombs(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 20_000_000)
    assert file.stat().st_size < 100_000
    refused(file, str(file), "data.pkl", "compressed or too large")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_torch_files_without_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"module": {"epoch": 3}}, file)
    refused(file, str(file), "'epoch' is a int, expected a tensor")
    torch.save([torch.zeros(2)], file)
    refused(file, str(file), "expected a dict of tensors, got list")


def test_non_float_tensors_in_a_torch_file(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"module": {"a.weight": torch.zeros(3, dtype=torch.int64)}}, file)
    refused(file, str(file), "a.weight has dtype torch.int64")


# --- arguments -------------------------------------------------------------------------------


def test_arguments(stored: Path) -> None:
    load = HunyuanVideoTransformer.from_pretrained
    for dtype in (torch.int8, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(ValueError, match="dtype must be one of"):
            load(stored / "native", dtype=dtype)
    with pytest.raises(ValueError, match="device must be like"):
        load(stored / "native", device="gpu")
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        load(stored / "native", device="cuda:99")
    model = load(stored / "native")
    with pytest.raises(ValueError, match='layout must be "native" or "diffusers"'):
        model.save_pretrained(stored / "new", layout="official")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        model.save_pretrained(stored / "new", max_shard_bytes=0)
    with without_memory():
        empty = HunyuanVideoTransformer(**RELEASED_HEAD)
    with pytest.raises(ValueError, match=r"no values to save: img_in\.proj\.weight"):
        empty.save_pretrained(stored / "new")
    assert not (stored / "new").exists()
