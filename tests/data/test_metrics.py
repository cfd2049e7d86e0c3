"""PSNR and SSIM against their definitions, computed the slow way."""

import math

import pytest
import torch

from hunyuan_fast.data.metrics import psnr, ssim


def random_pair(seed: int, shape: tuple[int, ...], noise: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 256, shape, generator=generator)
    b = (a + torch.randint(-noise, noise + 1, shape, generator=generator)).clamp(0, 255)
    return a.to(torch.uint8), b.to(torch.uint8)


def slow_ssim(a: torch.Tensor, b: torch.Tensor, data_range: float) -> float:
    """Every window of every channel of every frame, one after the other."""
    axis = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 4.5)
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = []
    frames, height, width, channels = a.shape
    for t in range(frames):
        for c in range(channels):
            for y in range(height - 10):
                for x in range(width - 10):
                    p = a[t, y : y + 11, x : x + 11, c].double()
                    q = b[t, y : y + 11, x : x + 11, c].double()
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    scores.append(
                        (2 * mp * mq + c1)
                        * (2 * cov + c2)
                        / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                    )
    return float(torch.stack(scores).mean())


@pytest.mark.parametrize("noise", [1, 20, 200])
def test_psnr_by_definition(noise: int) -> None:
    a, b = random_pair(noise, (3, 8, 9, 3), noise)
    mse = sum((int(p) - int(q)) ** 2 for p, q in zip(a.flatten(), b.flatten(), strict=True))
    expected = 10 * math.log10(255**2 / (mse / a.numel()))
    assert math.isclose(psnr(a, b), expected, rel_tol=1e-12)
    assert psnr(a, b) == psnr(b, a)


def test_psnr_known_values() -> None:
    black, white = torch.zeros(2, 4, 4, 3), torch.ones(2, 4, 4, 3)
    assert psnr(black, white) == 0
    assert psnr(black, white * 0.1) == pytest.approx(20, abs=1e-6)
    assert psnr(black, black) == math.inf
    assert psnr(black, white, data_range=2) == pytest.approx(20 * math.log10(2))


@pytest.mark.parametrize("noise", [2, 60])
def test_ssim_by_definition(noise: int) -> None:
    a, b = random_pair(noise, (2, 14, 13, 2), noise)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b, 255), abs=1e-9)
    assert ssim(a / 255, b / 255) == pytest.approx(ssim(a, b), abs=1e-5)


def test_ssim_bounds() -> None:
    a, b = random_pair(5, (2, 16, 16, 3), 30)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert ssim(a, 255 - a) < 0 < ssim(a, b) < 1


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refusals(metric) -> None:
    clip = torch.zeros(2, 16, 16, 3)
    with pytest.raises(ValueError, match="same shape and dtype"):
        metric(clip, clip[:1])
    with pytest.raises(ValueError, match="same shape and dtype"):
        metric(clip, clip.to(torch.uint8))
    with pytest.raises(ValueError, match="must not be empty"):
        metric(clip[:0], clip[:0])
    with pytest.raises(ValueError, match="data_range must be positive"):
        metric(clip, clip, data_range=0)


def test_ssim_needs_a_window() -> None:
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 10, 16, 3), torch.zeros(1, 10, 16, 3))
