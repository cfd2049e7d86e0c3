"""Every layout gives back the bits that went in, and diffusers reads what we write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from tests.models.dit_cases import diffusers_twin, run_twin, tiny_inputs
from tests.models.weights.cases import (
    RELEASED_HEAD,
    assert_same_weights,
    random_transformer,
    random_vae,
    write_official_transformer,
    write_official_vae,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("shard", [2**30, 40_000, 1])
def test_transformer_round_trip(
    tmp_path: Path, generator: torch.Generator, layout: str, dtype: torch.dtype, shard: int
) -> None:
    model = random_transformer(generator).to(dtype)
    model.save_pretrained(tmp_path / "m", layout=layout, max_shard_bytes=shard)
    again = HunyuanVideoTransformer.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert not again.training
    assert_same_weights(model, again)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_vae_round_trip(tmp_path: Path, generator: torch.Generator, layout: str) -> None:
    model = random_vae(generator, scaling_factor=0.7)
    model.save_pretrained(tmp_path / "m", layout=layout, max_shard_bytes=100_000)
    again = HunyuanVideoVAE.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert_same_weights(model, again)


def test_a_chain_of_all_layouts_changes_nothing(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator, **RELEASED_HEAD).bfloat16()
    file = write_official_transformer(model, tmp_path)
    first = HunyuanVideoTransformer.from_pretrained(file)
    first.save_pretrained(tmp_path / "diffusers", layout="diffusers", max_shard_bytes=200_000)
    second = HunyuanVideoTransformer.from_pretrained(tmp_path / "diffusers")
    second.save_pretrained(tmp_path / "native")
    third = HunyuanVideoTransformer.from_pretrained(tmp_path / "native")
    assert third.config == model.config
    assert_same_weights(model, third)


def test_shards_respect_the_limit_and_the_index_is_complete(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_transformer(generator)
    limit = 60_000
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    seen: dict[str, str] = {}
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        tensors = load_file(shard)
        total = sum(value.nbytes for value in tensors.values())
        assert total <= limit or len(tensors) == 1
        seen |= dict.fromkeys(tensors, shard.name)
    assert index["weight_map"] == seen
    assert set(seen) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in model.state_dict().values())


def test_diffusers_reads_our_transformer_and_agrees(
    tmp_path: Path, generator: torch.Generator
) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = random_transformer(generator)
    model.save_pretrained(tmp_path, layout="diffusers", max_shard_bytes=100_000)
    theirs = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        torch.testing.assert_close(run_twin(theirs, inputs), model(**inputs), atol=1e-5, rtol=0)


def test_we_read_a_transformer_that_diffusers_wrote(
    tmp_path: Path, generator: torch.Generator
) -> None:
    pytest.importorskip("diffusers")
    model = random_transformer(generator)
    diffusers_twin(model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again = HunyuanVideoTransformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_weights(model, again)


def test_diffusers_and_we_read_each_others_vae(tmp_path: Path, generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = random_vae(generator)
    model.save_pretrained(tmp_path / "ours", layout="diffusers")
    theirs = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "ours").eval()
    video = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(video).latent_dist.mean
        torch.testing.assert_close(model.encode(video).mean, mean, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = HunyuanVideoVAE.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert_same_weights(model, again)


@pytest.mark.parametrize("wrapper", ["module", None])
def test_official_transformer(
    tmp_path: Path, generator: torch.Generator, wrapper: str | None
) -> None:
    model = random_transformer(generator, **RELEASED_HEAD, guidance_embed=wrapper is None)
    file = write_official_transformer(model, tmp_path, wrapper=wrapper)
    for place in (file, file.parent, tmp_path):
        again = HunyuanVideoTransformer.from_pretrained(place)
        assert again.config == model.config
        assert_same_weights(model, again)


def test_official_transformer_with_another_head_needs_its_config(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_transformer(generator)
    file = write_official_transformer(model, tmp_path)
    with pytest.raises(ValueError, match=r"img_attn_q_norm\.weight has 24 features.*config="):
        HunyuanVideoTransformer.from_pretrained(file)
    again = HunyuanVideoTransformer.from_pretrained(file, config=model.config)
    assert_same_weights(model, again)


@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_official_vae(tmp_path: Path, generator: torch.Generator, prefix: str) -> None:
    model = random_vae(generator)
    file = write_official_vae(model, tmp_path, prefix=prefix)
    for place in (file, file.parent, tmp_path):
        again = HunyuanVideoVAE.from_pretrained(place)
        assert again.config == model.config
        assert_same_weights(model, again)


def test_dtype_applies_to_every_parameter(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator)
    model.save_pretrained(tmp_path, layout="diffusers")
    again = HunyuanVideoTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_weights(model.bfloat16(), again)


def test_mixed_stored_dtypes_stay_as_stored(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator).bfloat16()
    model.final_layer.linear.float()
    model.save_pretrained(tmp_path)
    assert_same_weights(model, HunyuanVideoTransformer.from_pretrained(tmp_path))


def test_loading_leaves_no_tie_to_the_file(tmp_path: Path, generator: torch.Generator) -> None:
    """Parameters own their memory: a file that changes later changes no loaded model."""
    model = random_transformer(generator)
    model.save_pretrained(tmp_path)
    again = HunyuanVideoTransformer.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert_same_weights(model, again)


def test_loaded_models_train(tmp_path: Path, generator: torch.Generator) -> None:
    random_transformer(generator).save_pretrained(tmp_path)
    again = HunyuanVideoTransformer.from_pretrained(tmp_path)
    again(**tiny_inputs(generator)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_subfolder_of_a_pipeline(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator)
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "hunyuan_fast.json").write_text("{}")
    for place, subfolder in ((tmp_path, None), (tmp_path, "transformer")):
        again = HunyuanVideoTransformer.from_pretrained(place, subfolder=subfolder)
        assert_same_weights(model, again)
    with pytest.raises(ValueError, match="stay inside"):
        HunyuanVideoTransformer.from_pretrained(tmp_path, subfolder="../elsewhere")
