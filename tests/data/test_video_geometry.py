"""Scaling and cropping: the planned size always fits, and pixels stay where they belong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_fast.data.geometry import Fit, apply_fit, fit, whole_frames


def test_crop_only() -> None:
    assert fit(272, 640) == Fit((272, 640), (272, 640))
    assert fit(144, 176) == Fit((144, 176), (144, 176))
    assert fit(719, 1279) == Fit((719, 1279), (704, 1264))
    assert fit(719, 1279, multiple=8) == Fit((719, 1279), (712, 1272))


def test_one_side_keeps_the_aspect_ratio() -> None:
    assert fit(720, 1280, to_height=96) == Fit((96, 171), (96, 160))
    assert fit(720, 1280, to_width=96) == Fit((54, 96), (48, 96))


def test_both_sides_cover() -> None:
    assert fit(720, 1280, to_height=96, to_width=96) == Fit((96, 171), (96, 96))
    assert fit(90, 50, to_height=32, to_width=64) == Fit((115, 64), (32, 64))


sides = st.integers(16, 2000)
targets = st.none() | st.integers(1, 60).map(lambda n: 16 * n)


@settings(max_examples=300, deadline=None)
@given(sides, sides, targets, targets)
def test_the_crop_lies_inside_the_scaled_frame(
    height: int, width: int, to_height: int | None, to_width: int | None
) -> None:
    try:
        plan = fit(height, width, to_height=to_height, to_width=to_width)
    except ValueError as error:
        assert "at least 16x16" in str(error)
        return
    for scaled, size, target in zip(plan.scaled, plan.size, (to_height, to_width), strict=True):
        assert 0 < size <= scaled and size % 16 == 0
        assert target in (None, size)
    if to_height is None or to_width is None:
        assert max(s - c for s, c in zip(plan.scaled, plan.size, strict=True)) < 16


def test_crop_takes_the_centre() -> None:
    frames = torch.arange(2 * 20 * 40 * 3).remainder(251).to(torch.uint8).view(2, 20, 40, 3)
    assert torch.equal(apply_fit(frames, fit(20, 40)), frames[:, 2:18, 4:36])


def test_scaling_keeps_a_gradient() -> None:
    ramp = torch.linspace(0, 255, 128).view(1, 1, -1, 1).expand(3, 64, 128, 3).to(torch.uint8)
    small = apply_fit(ramp, fit(64, 128, to_width=64))
    assert small.shape == (3, 32, 64, 3)
    expected = torch.linspace(0, 255, 128).view(64, 2).mean(1)
    assert (small[0, 0, 1:-1, 0] - expected[1:-1]).abs().max() <= 1.5


@pytest.mark.parametrize(("side", "near"), [(100, 96), (7, 16), (0, 16), (-16, 16), (24, 32)])
def test_sides_must_be_multiples(side: int, near: int) -> None:
    with pytest.raises(ValueError, match=f"height must be .* of 16, got {side}; .* is {near}"):
        fit(64, 64, to_height=side)


def test_too_small() -> None:
    with pytest.raises(ValueError, match="at least 16x16 to be cropped, got 15x400"):
        fit(15, 400)


def test_whole_frames() -> None:
    assert [whole_frames(n) for n in (1, 4, 5, 8, 9, 250)] == [1, 1, 5, 5, 9, 249]
    with pytest.raises(ValueError, match="got 0"):
        whole_frames(0)
