"""Patches and sinusoids against convolution and closed forms."""

import math

import pytest
import torch

from hunyuan_fast.modules.embedding import (
    PatchEmbedding,
    TimestepEmbedder,
    patchify,
    sinusoidal_embedding,
    unpatchify,
)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_patch_embedding_is_a_strided_convolution(generator, patch_size):
    embed = PatchEmbedding(patch_size, 5, 32)
    pt, ph, pw = patch_size
    latents = torch.randn(2, 5, 3 * pt, 4 * ph, 2 * pw, generator=generator)
    with torch.no_grad():
        expected = embed.proj(latents).flatten(2).transpose(1, 2)
        torch.testing.assert_close(embed(latents), expected, rtol=0, atol=1e-6)


def test_patch_features_are_ordered_channel_time_row_column():
    video = torch.arange(2 * 2 * 4 * 4).view(1, 2, 2, 4, 4)
    patches = patchify(video, (2, 2, 2))
    assert patches.shape == (1, 4, 16)
    assert patches[0, 1].tolist() == video[0, :, :, :2, 2:].flatten().tolist()


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 3, 1)])
def test_unpatchify_undoes_patchify(generator, patch_size):
    grid = (2, 3, 4)
    sizes = [n * p for n, p in zip(grid, patch_size, strict=True)]
    video = torch.randn(2, 3, *sizes, generator=generator)
    found = unpatchify(patchify(video, patch_size), grid, patch_size)
    assert torch.equal(found, video)
    assert found._base is None and found.is_contiguous()


def test_sinusoid_reference_values():
    embedding = sinusoidal_embedding(torch.tensor([997.093017578125]), 256)[0]
    expected_cos = torch.tensor([-0.354753, -0.456224, -0.881853])
    expected_sin = torch.tensor([-0.934960, -0.889865, 0.471525])
    torch.testing.assert_close(embedding[:3], expected_cos, rtol=0, atol=2e-6)
    torch.testing.assert_close(embedding[128:131], expected_sin, rtol=0, atol=2e-6)


def test_sinusoid_formula(generator):
    values = 8000 * torch.rand(5, generator=generator)
    frequencies = [math.exp(-math.log(10000.0) * i / 128) for i in range(128)]
    angles = values.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    expected = torch.cat((angles.cos(), angles.sin()), dim=1).float()
    # An angle near 8000 has an error of 5e-4 in float32.
    torch.testing.assert_close(sinusoidal_embedding(values, 256), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_timestep_embedder_takes_the_dtype_of_its_weights(dtype):
    embedder = TimestepEmbedder(16).to(dtype)
    assert embedder(torch.tensor([3.0, 999.0])).dtype == dtype
