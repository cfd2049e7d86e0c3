"""What a clip shows, read off its pixels by plain rules: nothing here is learned.

The background is the middle colour of the border; what differs from it is the thing. Its colour
is the nearest named one, its direction the shift of its centre, its shape the template that
overlaps it best.
"""

from dataclasses import dataclass

import numpy as np

from hunyuan_fast.data.shapes.render import signed_distance
from hunyuan_fast.data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES

# Below half the distance of the closest colour and background in 8-bit RGB (purple, gray: 104).
FOREGROUND_DISTANCE = 45.0
# The slowest thing travels a fifth of the frame; a still one must stay within a third of that.
STILL_TRAVEL = 0.07
MIN_AREA = 0.004


@dataclass(frozen=True)
class Verdict:
    """What one clip shows; every field is None where there is nothing to be seen."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None


def judge(frames: np.ndarray) -> Verdict:
    """Look at a clip of one thing. frames: uint8 (T, H, W, 3)."""
    pixels = frames.astype(np.float32)
    plain = _background(pixels)
    masks = np.linalg.norm(pixels - plain, axis=-1) > FOREGROUND_DISTANCE  # (T, H, W)
    background = _nearest(plain, BACKGROUNDS)
    seen = [t for t in range(len(masks)) if masks[t].mean() > MIN_AREA]
    if not seen:
        return Verdict(None, None, None, background)
    return Verdict(_colour(pixels, masks), _shape(masks, seen), _direction(masks, seen), background)


def _background(pixels: np.ndarray) -> np.ndarray:
    border = np.concatenate(
        [
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
            pixels[:, :, :3].reshape(-1, 3),
            pixels[:, :, -3:].reshape(-1, 3),
        ]
    )
    return np.median(border, axis=0)


def _nearest(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(
        names, key=lambda name: float(np.linalg.norm(rgb - np.array(names[name], dtype=np.float32)))
    )


def _colour(pixels: np.ndarray, masks: np.ndarray) -> str:
    """The nearest name of the middle colour, edges left out: they mix with the background."""
    inner = masks.copy()
    inner[:, 1:] &= masks[:, :-1]
    inner[:, :-1] &= masks[:, 1:]
    inner[:, :, 1:] &= masks[:, :, :-1]
    inner[:, :, :-1] &= masks[:, :, 1:]
    return _nearest(np.median(pixels[inner if inner.any() else masks], axis=0), COLOURS)


def _centre(mask: np.ndarray) -> np.ndarray:
    """Centre (x, y) of the mask's pixels, in units of the frame."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean() / mask.shape[1], rows.mean() / mask.shape[0]])


def _direction(masks: np.ndarray, seen: list[int]) -> str:
    x, y = _centre(masks[seen[-1]]) - _centre(masks[seen[0]])
    if max(abs(x), abs(y)) < STILL_TRAVEL:
        return "still"
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _shape(masks: np.ndarray, seen: list[int]) -> str:
    """Every fourth frame votes by its best overlaps; the largest sum wins."""
    votes = dict.fromkeys(SHAPES, 0.0)
    for t in seen[::4]:
        for shape, overlap in _overlaps(masks[t]).items():
            votes[shape] += overlap
    return max(votes, key=lambda shape: votes[shape])


def _overlaps(mask: np.ndarray) -> dict[str, float]:
    """Best intersection over union of the mask with each shape, over a few sizes and offsets."""
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32)
    middle_x = (columns.min() + columns.max()) / 2
    middle_y = (rows.min() + rows.max()) / 2
    reach = max(float(np.ptp(columns)), float(np.ptp(rows))) / 2 + 0.5
    best = dict.fromkeys(SHAPES, 0.0)
    for shape in SHAPES:
        for radius in (0.8 * reach, 0.9 * reach, reach, 1.12 * reach):
            for shift in (-0.12 * reach, 0.0, 0.12 * reach):
                drawn = signed_distance(shape, radius, x - middle_x, y - middle_y - shift) < 0
                overlap = (drawn & mask).sum() / max(1, (drawn | mask).sum())
                best[shape] = max(best[shape], float(overlap))
    return best
