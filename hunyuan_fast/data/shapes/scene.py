"""What can be in a clip: shapes, colours, motions, sizes, speeds, backgrounds; and the split."""

from dataclasses import dataclass
from itertools import product

import numpy as np

# With the reach of each from its centre, in radii.
REACH = {"circle": 1.0, "square": 0.88, "triangle": 1.1, "star": 1.18}
SHAPES = tuple(REACH)
# sRGB; far apart from each other and from every background, so that a checker can tell them.
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (45, 80, 230),
    "yellow": (240, 220, 40),
    "white": (245, 245, 245),
    "purple": (160, 50, 200),
}
# Unit steps (x, y) on the image plane; y grows downwards.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
# "Radius" in pixels of a 96-pixel frame; scaled with the frame.
SIZES = {"small": 10.0, "medium": 13.5, "large": 17.5}
# Pixels of a 96-pixel frame from one frame to the next.
SPEEDS = {"slow": 1.25, "normal": 2.0, "fast": 2.9}
BACKGROUNDS = {
    "black": (10, 10, 12),
    "gray": (110, 110, 110),
    "brown": (95, 62, 36),
    "teal": (0, 88, 92),
}

Combination = tuple[str, str, str]  # (colour, shape, direction)


def is_held_out(colour: str, shape: str, direction: str) -> bool:
    """Whether a combination never appears in training.

    A Latin pattern over the three indices: 24 of the 120 combinations are held out, while every
    pair (colour, shape), (colour, direction) and (shape, direction) is still seen in training.
    """
    c, s, d = list(COLOURS).index(colour), SHAPES.index(shape), list(DIRECTIONS).index(direction)
    return (c + 2 * s + 3 * d) % 5 == 0


HELD_OUT: tuple[Combination, ...] = tuple(
    combination for combination in product(COLOURS, SHAPES, DIRECTIONS) if is_held_out(*combination)
)
TRAINED: tuple[Combination, ...] = tuple(
    combination
    for combination in product(COLOURS, SHAPES, DIRECTIONS)
    if not is_held_out(*combination)
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving object; ``start`` is its first centre, in units of the frame's size."""

    colour: str
    shape: str
    direction: str
    size: str
    speed: str
    start: tuple[float, float]

    @property
    def radius(self) -> float:
        """In units of the frame's size."""
        return SIZES[self.size] / 96

    @property
    def reach(self) -> float:
        """How far the outline goes from the centre, in units of the frame's size."""
        return self.radius * REACH[self.shape]

    @property
    def travel(self) -> tuple[float, float]:
        """Displacement over a whole clip, in units of the frame's size."""
        step = SPEEDS[self.speed] * 16 / 96
        dx, dy = DIRECTIONS[self.direction]
        return dx * step, dy * step


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip: one or two things on a plain background."""

    things: tuple[Thing, ...]
    background: str


def _place(
    rng: np.random.Generator, reach: float, travel: tuple[float, float]
) -> tuple[float, float]:
    """A start from which the whole path stays inside the frame."""
    margin = reach + 0.02
    low = [max(margin, margin - step) for step in travel]
    high = [min(1 - margin, 1 - margin - step) for step in travel]
    return float(rng.uniform(low[0], high[0])), float(rng.uniform(low[1], high[1]))


def _thing(rng: np.random.Generator, combination: Combination, sizes: tuple[str, ...]) -> Thing:
    colour, shape, direction = combination
    draft = Thing(
        colour=colour,
        shape=shape,
        direction=direction,
        size=str(rng.choice(sizes)),
        speed=str(rng.choice(list(SPEEDS))),
        start=(0.0, 0.0),
    )
    start = _place(rng, draft.reach, draft.travel)
    return Thing(**{**draft.__dict__, "start": start})


def _apart(first: Thing, second: Thing) -> bool:
    """Whether two things never overlap: sampled along their common time."""
    for moment in np.linspace(0, 1, 9):
        dx = first.start[0] + moment * first.travel[0] - second.start[0] - moment * second.travel[0]
        dy = first.start[1] + moment * first.travel[1] - second.start[1] - moment * second.travel[1]
        if dx * dx + dy * dy < (first.reach + second.reach + 0.02) ** 2:
            return False
    return True


def sample_scene(
    rng: np.random.Generator,
    *,
    combinations: tuple[Combination, ...] = TRAINED,
    two_things: float = 0.2,
) -> Scene:
    """Draw a scene of things from ``combinations``, two of them with probability ``two_things``."""
    first = _thing(rng, combinations[rng.integers(len(combinations))], tuple(SIZES))
    things: tuple[Thing, ...] = (first,)
    if rng.random() < two_things:
        # A bounded search: large fast things sometimes leave no room, and then one is enough.
        for _ in range(20):
            second = _thing(rng, combinations[rng.integers(len(combinations))], ("small", "medium"))
            if second.colour != first.colour and _apart(first, second):
                things = (first, second)
                break
    return Scene(things=things, background=str(rng.choice(list(BACKGROUNDS))))
