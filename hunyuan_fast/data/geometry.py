"""Bringing clips of any size to one a model takes: scale, crop, cut."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Fit:
    """Scale to ``scaled`` (height, width), then cut ``size`` (height, width) out of the centre."""

    scaled: tuple[int, int]
    size: tuple[int, int]


def fit(
    height: int,
    width: int,
    *,
    to_height: int | None = None,
    to_width: int | None = None,
    multiple: int = 16,
) -> Fit:
    """Plan how frames of ``height`` x ``width`` become a size whose sides are multiples.

    Neither side given: nothing is scaled, at most ``multiple - 1`` pixels go on each axis. One
    side given: the frame is scaled to it and keeps its aspect ratio, up to the crop of the other
    side. Both given: the frame is scaled to cover them, and what sticks out is cropped.

    Raises:
        ValueError: a side is not a positive multiple, or the frame is smaller than one multiple.
    """
    for name, side in (("height", to_height), ("width", to_width)):
        if side is not None and (side < multiple or side % multiple):
            near = max(round(side / multiple), 1) * multiple
            raise ValueError(
                f"{name} must be a positive multiple of {multiple}, got {side}; "
                f"the nearest is {near}"
            )
    if to_height is None and to_width is None:
        scaled = (height, width)
    else:
        ratio = max((to_height or 0) / height, (to_width or 0) / width)
        scaled = (
            max(round(height * ratio), to_height or 1),
            max(round(width * ratio), to_width or 1),
        )
    size = (
        to_height or scaled[0] // multiple * multiple,
        to_width or scaled[1] // multiple * multiple,
    )
    if 0 in size:
        raise ValueError(
            f"frames must be at least {multiple}x{multiple} to be cropped, got "
            f"{scaled[0]}x{scaled[1]}; scale them up by giving a height and a width"
        )
    return Fit(scaled, size)


def apply_fit(frames: torch.Tensor, plan: Fit) -> torch.Tensor:
    """Scale (bicubic, antialiased) and crop ``(T, H, W, 3)`` uint8 frames as planned."""
    if tuple(frames.shape[1:3]) != plan.scaled:
        # Frame by frame: the float copy of a long clip would be four times the clip.
        frames = torch.stack([_scale(frame, plan.scaled) for frame in frames])
    top, left = ((s - c) // 2 for s, c in zip(plan.scaled, plan.size, strict=True))
    return frames[:, top : top + plan.size[0], left : left + plan.size[1]].contiguous()


def _scale(frame: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    x = frame.permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    return x[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def whole_frames(available: int, ratio: int = 4) -> int:
    """The largest ``ratio * n + 1`` that is at most ``available``: clips start with a lone frame.

    Raises:
        ValueError: there is no frame.
    """
    if available < 1:
        raise ValueError(f"available must be at least 1 frame, got {available}")
    return (available - 1) // ratio * ratio + 1
