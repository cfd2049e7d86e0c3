"""Many ways to say what a scene shows.

The grammar is small on purpose: its words are the tokenizer's vocabulary.
"""

import numpy as np

from hunyuan_fast.data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

MOVES = ("moving", "that moves", "drifting", "sliding", "going", "that is moving", "travelling")
TOWARDS = {
    "left": ("left", "to the left", "leftwards", "from right to left"),
    "right": ("right", "to the right", "rightwards", "from left to right"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}
STILL = ("standing still", "that stays still", "not moving", "that does not move", "at rest")
PACES = {"slow": ("slowly", "at a slow pace"), "fast": ("fast", "quickly")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
OPENINGS = ("", "", "", "a video of", "a clip of", "there is", "we see")


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def _noun(rng: np.random.Generator, thing: Thing) -> str:
    """ "a large red circle", with the size said only now and then."""
    size = ""
    if thing.size in SIZE_WORDS and rng.random() < 0.5:
        size = _pick(rng, SIZE_WORDS[thing.size]) + " "
    article = _pick(rng, ("a", "a", "a", "the", "one"))
    return f"{article} {size}{thing.colour} {thing.shape}"


def _motion(rng: np.random.Generator, thing: Thing) -> str:
    if thing.direction == "still":
        return _pick(rng, STILL)
    words = f"{_pick(rng, MOVES)} {_pick(rng, TOWARDS[thing.direction])}"
    if thing.speed in PACES and rng.random() < 0.5:
        words += " " + _pick(rng, PACES[thing.speed])
    return words


def describe(rng: np.random.Generator, scene: Scene, *, motion: bool = True) -> str:
    """One caption of ``scene``, lower case; without ``motion`` that of a still image."""
    phrases = []
    for thing in scene.things:
        noun = _noun(rng, thing)
        phrases.append(f"{noun} {_motion(rng, thing)}" if motion else noun)
    text = " and ".join(phrases)
    opening = _pick(rng, OPENINGS)
    if opening:
        text = f"{opening} {text}"
    if rng.random() < 0.4:
        text += f" on a {scene.background} background"
    return text


def plain(colour: str, shape: str, direction: str) -> str:
    """The plainest caption: "a red circle moving right", "a red circle standing still"."""
    motion = "standing still" if direction == "still" else f"moving {direction}"
    return f"a {colour} {shape} {motion}"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, in a fixed order."""
    phrases = [
        *SHAPES,
        *COLOURS,
        *BACKGROUNDS,
        *MOVES,
        *STILL,
        *OPENINGS,
        *(phrase for group in TOWARDS.values() for phrase in group),
        *(phrase for group in PACES.values() for phrase in group),
        *(phrase for group in SIZE_WORDS.values() for phrase in group),
        "a the one and on background , .",
    ]
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
