"""Does the miniature do what prompts say? Held-out combinations, judged by their pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hunyuan_fast.data.shapes.batches import clip
from hunyuan_fast.data.shapes.caption import describe, plain
from hunyuan_fast.data.shapes.judge import Verdict, judge
from hunyuan_fast.data.shapes.scene import HELD_OUT, Combination, sample_scene
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.trainer.nano.recipe import FRAMES, SIZE


class Generator(Protocol):
    """A pipeline: prompts to uint8 (B, T, H, W, 3), video i drawn from seed + i."""

    def __call__(self, prompt: Sequence[str], *, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Trial:
    """One prompt, what it asks for and what was seen."""

    prompt: str
    wanted: Combination
    seen: Verdict

    @property
    def right(self) -> dict[str, bool]:
        colour, shape, direction = self.wanted
        return {
            "colour": self.seen.colour == colour,
            "shape": self.seen.shape == shape,
            "direction": self.seen.direction == direction,
        }


def held_out_prompts(count: int, *, seed: int = 0) -> list[tuple[str, Combination]]:
    """``count`` prompts over all held-out combinations in turn, the first round in plain words."""
    prompts = []
    for index in range(count):
        combination = HELD_OUT[index % len(HELD_OUT)]
        rng = np.random.default_rng((seed, index))
        scene = sample_scene(rng, combinations=(combination,), two_things=0.0)
        text = plain(*combination) if index < len(HELD_OUT) else describe(rng, scene)
        prompts.append((text, combination))
    return prompts


def run_trials(
    generate: Generator,
    prompts: Sequence[tuple[str, Combination]],
    *,
    seed: int = 0,
    batch: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Generate a clip for every prompt, a batch at a time, and judge it."""
    trials: list[Trial] = []
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        videos = generate([text for text, _ in group], seed=seed + first)
        for (text, wanted), video in zip(group, videos, strict=True):
            trials.append(Trial(text, wanted, judge(video.numpy())))
        if on_batch is not None:
            on_batch(len(trials), len(prompts))
    return trials


def accuracy(trials: Sequence[Trial]) -> dict[str, float]:
    """Share of trials with colour, shape and direction right, and with all three right."""
    rights = [trial.right for trial in trials]
    shares = {name: sum(right[name] for right in rights) / len(rights) for name in rights[0]}
    return {**shares, "all": sum(all(right.values()) for right in rights) / len(rights)}


@torch.no_grad()
def reconstruction_psnr(vae: HunyuanVideoVAE, *, seed: int, count: int) -> list[float]:
    """PSNR in dB of decode(encode(clip)) for clips of held-out combinations; peak value 1."""
    values = []
    for index in range(count):
        video = clip(seed, index, num_frames=FRAMES, size=SIZE, combinations=HELD_OUT)[None]
        video = video.to(next(vae.parameters()))
        decoded = vae.decode(vae.encode(video).mode()).clamp(-1, 1)
        values.append(-10 * torch.log10(((decoded - video) / 2).float().square().mean()).item())
    return values
