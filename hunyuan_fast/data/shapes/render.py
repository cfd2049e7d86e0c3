"""Scenes to pixels: signed distances, antialiased over one pixel."""

import math

import numpy as np

from hunyuan_fast.data.shapes.scene import BACKGROUNDS, COLOURS, Scene


def _polygon(points: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon, negative inside. x, y: any shape."""
    nearest = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (x - x0 - along * ex) ** 2 + (y - y0 - along * ey) ** 2)
        crosses = (y0 > y) != (y1 > y)
        if ey != 0:
            inside ^= crosses & (x < x0 + (y - y0) * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _star(radius: float) -> list[tuple[float, float]]:
    """A five-pointed star, one point up."""
    rays = [radius * (1.18 if k % 2 == 0 else 0.5) for k in range(10)]
    angles = [-math.pi / 2 + k * math.pi / 5 for k in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(rays, angles, strict=True)]


def signed_distance(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape centred at the origin, negative inside.

    x, y: coordinates of any equal shape. Raises ValueError for an unknown shape.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        half = 0.88 * radius
        return _polygon([(-half, -half), (half, -half), (half, half), (-half, half)], x, y)
    if shape == "triangle":
        return _polygon(
            [(0, -1.05 * radius), (1.1 * radius, 0.85 * radius), (-1.1 * radius, 0.85 * radius)],
            x,
            y,
        )
    if shape == "star":
        return _polygon(_star(radius), x, y)
    raise ValueError(f"shape must be circle, square, triangle or star, got {shape!r}")


def render(scene: Scene, *, num_frames: int = 17, height: int = 96, width: int = 96) -> np.ndarray:
    """Draw a scene. Returns uint8 (T, H, W, 3).

    A thing travels the same way whatever ``num_frames`` is; one frame shows its start.
    """
    unit = min(height, width)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    frames = np.empty((num_frames, height, width, 3), dtype=np.float32)
    frames[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour], dtype=np.float32)
        for t in range(num_frames):
            moment = t / 16
            centre_x = (thing.start[0] + moment * thing.travel[0]) * width
            centre_y = (thing.start[1] + moment * thing.travel[1]) * height
            reach = math.ceil(1.3 * thing.radius * unit) + 2
            top, left = max(0, int(centre_y) - reach), max(0, int(centre_x) - reach)
            patch = (slice(top, int(centre_y) + reach), slice(left, int(centre_x) + reach))
            distance = signed_distance(
                thing.shape, thing.radius * unit, columns[patch] - centre_x, rows[patch] - centre_y
            )
            cover = np.clip(0.5 - distance, 0, 1)[..., None]
            frames[t][patch] += cover * (colour - frames[t][patch])
    return np.round(frames).astype(np.uint8)
