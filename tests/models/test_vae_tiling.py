"""Tiles: the numbers of diffusers, for its own windows, the official ones and small ones."""

import pytest
import torch

from hunyuan_fast.models.vae.tiling import PRESETS, Tiling, map_tiles, pixel_window
from tests.models.vae_cases import clip, diffusers_twin, tile_twin, tiny_vae

SMALL = Tiling(size=32, size_stride=24, frames=8, frames_stride=4)
# (tiling, frames, height, width): every way of being larger than a window or not
CASES = [
    (SMALL, 5, 40, 72),
    (SMALL, 17, 24, 32),
    (SMALL, 21, 64, 40),
    (SMALL, 9, 32, 32),
    (SMALL, 1, 48, 16),
    (PRESETS["official"], 69, 8, 16),
    (PRESETS["official"], 97, 8, 8),
    (PRESETS["official"], 1, 264, 40),
    (PRESETS["diffusers"], 25, 16, 16),
    (PRESETS["diffusers"], 33, 8, 8),
]


@pytest.mark.parametrize(("tiling", "frames", "height", "width"), CASES)
def test_tiles_equal_diffusers(generator, tiling, frames, height, width):
    vae = tiny_vae(generator)
    twin = diffusers_twin(vae)
    vae.enable_tiling(tiling)
    tile_twin(twin, tiling)
    video = clip(generator, 1, 3, frames, height, width)
    z = torch.randn(1, 4, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    with torch.no_grad():
        posterior, expected = vae.encode(video), twin.encode(video).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-4, rtol=0)
        decoded = vae.decode(z)
        torch.testing.assert_close(decoded, twin.decode(z).sample, atol=1e-4, rtol=0)
    assert posterior.mean.shape == z.shape
    assert decoded.shape == video.shape


def test_the_preset_of_diffusers_is_its_default(generator):
    vae = tiny_vae(generator)
    twin = diffusers_twin(vae)
    twin.use_framewise_encoding = twin.use_framewise_decoding = True
    vae.enable_tiling("diffusers")
    z = torch.randn(1, 4, 7, 1, 2, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z), twin.decode(z).sample, atol=1e-4, rtol=0)


def test_clips_within_a_window_are_untouched(generator):
    vae = tiny_vae(generator)
    video = clip(generator, 1, 3, 5, 32, 24)
    with torch.no_grad():
        whole = vae.encode(video).mean
        decoded = vae.decode(whole)
        vae.enable_tiling(SMALL)
        assert torch.equal(vae.encode(video).mean, whole)
        assert torch.equal(vae.decode(whole), decoded)
        vae.enable_tiling(Tiling(size=16, size_stride=8))
        assert not torch.equal(vae.decode(whole), decoded)
        vae.disable_tiling()
        assert torch.equal(vae.decode(whole), decoded)


@pytest.mark.parametrize(
    ("preset", "latents", "calls"),
    [
        ("official", (33, 90, 160), 84),
        ("official", (16, 32, 32), 1),
        ("official", (25, 32, 33), 8),
        ("diffusers", (33, 32, 32), 11),
    ],
)
def test_tiles_that_change_nothing_rebuild_the_clip(generator, preset, latents, calls):
    """33 latents of 90 x 160 take 3 windows of 4 x 7 tiles; an empty window is not run."""
    z = torch.randn(1, 1, *latents, generator=generator)
    tiling = PRESETS[preset]
    space = pixel_window(tiling.size // 8, tiling.size_stride // 8, 1)
    time = pixel_window(tiling.frames // 4, tiling.frames_stride // 4, 1)
    tiles = []
    rebuilt = map_tiles(lambda tile: tiles.append(tile) or tile, z, space, time)
    torch.testing.assert_close(rebuilt, z)
    assert len(tiles) == calls


def test_gradients_flow_through_tiles(generator):
    vae = tiny_vae(generator)
    vae.enable_tiling(SMALL)
    z = torch.randn(1, 4, 4, 5, 4, generator=generator, requires_grad=True)
    vae.decode(z).square().mean().backward()
    assert (z.grad != 0).all()


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("fast", r"preset must be one of \['diffusers', 'official'\] or a Tiling, got 'fast'"),
        (Tiling(size=36, size_stride=24), "window 36 and stride 24 must be multiples of 8"),
        (Tiling(frames=16, frames_stride=10), "window 16 and stride 10 must be multiples of 4"),
    ],
)
def test_refused_tilings(generator, preset, message):
    vae = tiny_vae(generator)
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(preset)
    assert vae.tiling is None


@pytest.mark.parametrize(
    "changes", [{"size_stride": 0}, {"size_stride": 257}, {"frames_stride": -4}, {"frames": 0}]
)
def test_impossible_windows(changes):
    with pytest.raises(ValueError, match=r"_stride must be in 1\.\."):
        Tiling(**changes)
