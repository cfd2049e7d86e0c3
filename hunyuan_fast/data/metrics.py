"""How close two clips are: PSNR and SSIM, in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(clip: Tensor, reference: Tensor, *, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB over all elements; ``inf`` for equal clips.

    Args:
        clip, reference: same shape and dtype, any layout.
        data_range: largest minus smallest possible value; None means 255 for uint8, else 1.

    Raises:
        ValueError: shapes or dtypes differ, or the clips are empty.
    """
    data_range = _checked_range(clip, reference, data_range)
    # In slices of the first axis, so that a long uint8 clip is never held in float64 as a whole.
    total = sum(
        (a.double() - b.double()).square().sum().item()
        for a, b in zip(clip, reference, strict=True)
    )
    error = total / clip.numel()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(clip: Tensor, reference: Tensor, *, data_range: float | None = None) -> float:
    """Structural similarity, averaged over frames, colour channels and window positions.

    Gaussian window of 11 x 11 pixels with standard deviation 1.5, positions fully inside the
    frame, K1 = 0.01, K2 = 0.03 (Wang et al., "Image quality assessment", 2004, section III).

    Args:
        clip, reference: ``(T, H, W, C)``, H and W at least 11.
        data_range: largest minus smallest possible value; None means 255 for uint8, else 1.

    Raises:
        ValueError: shapes or dtypes differ, not 4 axes, or frames smaller than the window.
    """
    data_range = _checked_range(clip, reference, data_range)
    if clip.ndim != 4 or min(clip.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"clips must be (T, H, W, C) with H and W at least {_WINDOW}, got {tuple(clip.shape)}"
        )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = [_ssim_frame(a, b, c1, c2) for a, b in zip(clip, reference, strict=True)]
    return sum(scores) / len(scores)


_WINDOW = 11


def _ssim_frame(a: Tensor, b: Tensor, c1: float, c2: float) -> float:
    """SSIM of one frame ``(H, W, C)``, in float64: the variances are differences of squares."""
    a, b = a.double().movedim(-1, 0), b.double().movedim(-1, 0)
    moments = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b, square_a, square_b, product = moments
    var_a, var_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean().item()


def _blur(x: Tensor) -> Tensor:
    """Separable Gaussian filter over the last two axes of ``(5, C, H, W)``, without padding."""
    offset = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * 1.5**2))
    weight = weight / weight.sum()
    flat = x.flatten(0, 1).unsqueeze(1)
    flat = F.conv2d(flat, weight.view(1, 1, -1, 1))
    flat = F.conv2d(flat, weight.view(1, 1, 1, -1))
    return flat.view(*x.shape[:2], *flat.shape[-2:])


def _checked_range(clip: Tensor, reference: Tensor, data_range: float | None) -> float:
    if clip.shape != reference.shape or clip.dtype != reference.dtype:
        raise ValueError(
            "clip and reference must have the same shape and dtype, got "
            f"{tuple(clip.shape)} {clip.dtype} and {tuple(reference.shape)} {reference.dtype}"
        )
    if clip.numel() == 0:
        raise ValueError(f"clips must not be empty, got shape {tuple(clip.shape)}")
    if data_range is not None:
        if data_range <= 0:
            raise ValueError(f"data_range must be positive, got {data_range}")
        return data_range
    return 255.0 if clip.dtype == torch.uint8 else 1.0
