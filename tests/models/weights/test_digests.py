"""The native layout finds flipped bits, zeroed pages and exchanged files, which others do not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.weights import CheckpointError, Manifest, seal
from tests.models.weights.cases import assert_same_weights, random_transformer

load = HunyuanVideoTransformer.from_pretrained


@pytest.fixture
def folder(tmp_path: Path, generator: torch.Generator) -> Path:
    random_transformer(generator).save_pretrained(tmp_path / "m", max_shard_bytes=400_000)
    return tmp_path / "m"


def test_every_flipped_bit_in_every_file_is_found(folder: Path) -> None:
    draw = random.Random(1)
    files = sorted(folder.iterdir())
    assert len(files) >= 5
    for file in files:
        whole = file.read_bytes()
        for _ in range(12):
            broken = bytearray(whole)
            broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(broken)
            with pytest.raises(CheckpointError) as caught:
                load(folder)
            assert str(folder) in str(caught.value)
        file.write_bytes(whole)
    load(folder)


def test_the_damaged_tensor_is_named(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    damaged = tensors[name].reshape(-1).view(torch.uint8)
    damaged[7] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{file.name}: {name} is damaged"):
        load(folder)
    again = load(folder, verify=False)
    assert torch.equal(again.state_dict()[name], tensors[name])


def test_zeroed_page_and_exchanged_shards(folder: Path, tmp_path: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[-8192:-4096] = bytes(4096)
    file.write_bytes(broken)
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)

    other = random_transformer(torch.Generator().manual_seed(77))
    other.save_pretrained(tmp_path / "other", max_shard_bytes=400_000)
    file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{file.name}: .* is damaged"):
        load(folder)
    file.write_bytes(whole)
    load(folder)


def test_missing_manifest_and_unlisted_file(folder: Path) -> None:
    manifest = folder / "manifest.json"
    content = manifest.read_text()
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: no such file"):
        load(folder)
    load(folder, verify=False)
    manifest.write_text(content)
    index = folder / "model.safetensors.index.json"
    index.unlink()
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(folder)


def test_one_file_of_a_native_folder_is_verified_too(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_transformer(generator)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert_same_weights(model, load(file))
    broken = bytearray(file.read_bytes())
    broken[-3] ^= 16
    file.write_bytes(broken)
    with pytest.raises(CheckpointError, match="damaged"):
        load(file)


def test_seal_covers_any_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "vocab.txt").write_text("a b c")
    (tmp_path / "model.safetensors").write_bytes(b"\1" * 3_000_000)
    seal(tmp_path)
    Manifest(tmp_path).check_files()
    for file in (tmp_path / "sub" / "vocab.txt", tmp_path / "model.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{file.name}: damaged"):
            Manifest(tmp_path).check_files()
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"{file.name}: truncated"):
            Manifest(tmp_path).check_files()
        file.write_bytes(whole)
