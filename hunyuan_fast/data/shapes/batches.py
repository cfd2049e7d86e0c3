"""A reproducible stream of captioned clips: sample ``i`` depends on (seed, i) alone."""

import numpy as np
import torch
from torch import Tensor

from hunyuan_fast.data.shapes.caption import describe
from hunyuan_fast.data.shapes.render import render
from hunyuan_fast.data.shapes.scene import TRAINED, Combination, Scene, sample_scene


def sample(
    seed: int,
    index: int,
    *,
    combinations: tuple[Combination, ...] = TRAINED,
    two_things: float = 0.2,
) -> tuple[Scene, str]:
    """Scene and caption number ``index`` of the stream ``seed``."""
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng, combinations=combinations, two_things=two_things)
    return scene, describe(rng, scene)


def caption(seed: int, index: int, *, variant: int = 0, motion: bool = True) -> str:
    """A phrasing of scene ``index``: the scene is the same, the words depend on ``variant``.

    motion: whether to say how things move; a single frame shows no motion.
    """
    scene, first = sample(seed, index)
    if variant == 0 and motion:
        return first
    return describe(np.random.default_rng((seed, index, variant)), scene, motion=motion)


def to_float(frames: np.ndarray | Tensor) -> Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., 3, T, H, W) in [-1, 1], as the VAE takes it."""
    video = torch.as_tensor(frames).movedim(-1, -4)
    return video.float() / 127.5 - 1


def clip(
    seed: int,
    index: int,
    *,
    num_frames: int = 17,
    size: int = 96,
    combinations: tuple[Combination, ...] = TRAINED,
) -> Tensor:
    """Clip number ``index``, (3, T, H, W) in [-1, 1]."""
    scene, _ = sample(seed, index, combinations=combinations)
    return to_float(render(scene, num_frames=num_frames, height=size, width=size))
