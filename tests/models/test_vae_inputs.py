"""Clips, latents and sizes that do not fit are refused by name."""

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.config import VAEConfig
from tests.models.vae_cases import TINY, tiny_vae

VIDEO_SHAPES = [
    ((3, 5, 16, 16), r"video must be \(B, 3, T, H, W\), got \(3, 5, 16, 16\)"),
    ((1, 4, 5, 16, 16), r"video must be \(B, 3, T, H, W\), got \(1, 4, 5, 16, 16\)"),
    ((1, 5, 16, 16, 3), r"video must be \(B, 3, T, H, W\)"),
    ((0, 3, 5, 16, 16), "video must not be empty"),
    ((1, 3, 0, 16, 16), "video must not be empty"),
    ((1, 3, 5, 16, 0), "video must not be empty"),
    ((1, 3, 4, 16, 16), r"video must have 4n \+ 1 frames, got 4; use 1 or 5"),
    ((1, 3, 18, 16, 16), r"video must have 4n \+ 1 frames, got 18; use 17 or 21"),
    ((1, 3, 16, 16, 16), r"got 16; use 13 or 17"),
    ((1, 3, 5, 20, 16), "height and width in multiples of 8, got 20 x 16"),
    ((1, 3, 5, 16, 7), "height and width in multiples of 8, got 16 x 7"),
]
LATENT_SHAPES = [
    ((4, 2, 2, 2), r"z must be \(B, 4, T, H, W\), got \(4, 2, 2, 2\)"),
    ((1, 16, 2, 2, 2), r"z must be \(B, 4, T, H, W\), got \(1, 16, 2, 2, 2\)"),
    ((1, 4, 0, 2, 2), "z must not be empty"),
    ((1, 4, 1, 2, 0), "z must not be empty"),
]


@pytest.fixture(scope="module")
def vae():
    return tiny_vae(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "message"), VIDEO_SHAPES)
def test_clips_of_wrong_shapes(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize(("shape", "message"), LATENT_SHAPES)
def test_latents_of_wrong_shapes(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize("value", [1.5, -1.02, 255.0, float("nan"), float("inf"), -float("inf")])
def test_clips_out_of_range(vae, value):
    video = torch.zeros(1, 3, 5, 16, 16)
    video[0, 1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"video must hold values in \[-1, 1\], got"):
        vae.encode(video)


def test_rounding_beyond_the_range_is_taken(vae):
    with torch.no_grad():
        assert vae.encode(torch.full((1, 3, 1, 8, 8), 1.005)).mean.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(vae, value):
    z = torch.zeros(1, 4, 2, 2, 2)
    z[0, 3, 1, 1, 0] = value
    with pytest.raises(ValueError, match="z must be finite, got NaN or infinity"):
        vae.decode(z)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_wrong_dtypes(vae, dtype):
    with pytest.raises(TypeError, match=f"video must be floating point, got {dtype}"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16, dtype=dtype))
    with pytest.raises(TypeError, match=f"z must be floating point, got {dtype}"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2, dtype=dtype))


def test_not_a_tensor(vae):
    with pytest.raises(TypeError, match="video must be a tensor, got ndarray"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16).numpy())
    with pytest.raises(TypeError, match="z must be a tensor, got list"):
        vae.decode([[0.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_dtypes_are_taken(vae, generator, dtype):
    video = torch.rand(1, 3, 1, 8, 8, generator=generator).to(dtype)
    with torch.no_grad():
        assert torch.equal(vae.encode(video).mean, vae.encode(video.float()).mean)
        z = vae.encode(video).mean.to(dtype)
        assert torch.equal(vae.decode(z), vae.decode(z.float()))


SIZES = [
    ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
    ({"layers_per_block": 0}, "layers_per_block must be at least 1, got 0"),
    ({"in_channels": -3}, "in_channels must be at least 1, got -3"),
    ({"norm_num_groups": 0}, "norm_num_groups must be at least 1, got 0"),
    ({"norm_num_groups": 3}, r"multiples of norm_num_groups = 3, got \(8, 8, 16, 16\)"),
    ({"block_out_channels": ()}, "block_out_channels must name at least one level"),
    ({"block_out_channels": (8, 8, 0, 16)}, r"got \(8, 8, 0, 16\)"),
    ({"block_out_channels": (8, 8)}, "spatial_compression_ratio=8 needs 3 resampling steps"),
    ({"temporal_compression_ratio": 16}, "temporal_compression_ratio=16 needs 4 resampling steps"),
    ({"spatial_compression_ratio": 6}, "spatial_compression_ratio must be a power of two, got 6"),
    ({"temporal_compression_ratio": 0}, "temporal_compression_ratio must be a power of two"),
    ({"scaling_factor": 0.0}, "scaling_factor must be positive, got 0.0"),
    ({"scaling_factor": float("nan")}, "scaling_factor must be positive, got nan"),
]


@pytest.mark.parametrize(("changes", "message"), SIZES)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        HunyuanVideoVAE(**{**TINY, **changes})


def test_unknown_setting():
    with pytest.raises(TypeError, match="latent_chanels"):
        HunyuanVideoVAE(latent_chanels=16)


def test_strides_of_the_released_model():
    assert VAEConfig().strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
    assert VAEConfig(block_out_channels=[128, 256, 512, 512]) == VAEConfig()
