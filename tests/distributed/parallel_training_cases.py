"""Runs of the training loop by several processes, and by one."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.trainer.ema import EMA
from hunyuan_fast.trainer.loop import LoopConfig, fit
from hunyuan_fast.trainer.nano import transformer as stages
from hunyuan_fast.trainer.nano.latents import LatentSet
from hunyuan_fast.trainer.nano.transformer import (
    DistillationConfig,
    DistillationStage,
    FlowConfig,
    FlowStage,
)
from hunyuan_fast.trainer.optim import OptimConfig, build_optimizers
from hunyuan_fast.trainer.states import RunStates
from hunyuan_fast.trainer.team import Team
from tests.distributed import fully_sharded_cases
from tests.models.dit_cases import TINY

CPU = torch.device("cpu")
STEPS = 4
MUON = OptimConfig(lr=1e-4, muon_lr=1e-2)
# The norm of the gradients is above this.
OPTIM = OptimConfig(lr=1e-4, max_grad_norm=0.1, weight_decay=0.1)


def transformer() -> HunyuanVideoTransformer:
    """The same weights on every rank."""
    return fully_sharded_cases.transformer(**fully_sharded_cases.HEADS)


class WordPrompts:
    """Text states that depend on the words of each caption, as many as it has."""

    device = CPU

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        words = [caption.split() for caption in captions]
        longest = max(1, *(len(of_one) for of_one in words))
        states = torch.zeros(len(words), longest, TINY["text_states_dim"])
        pooled = torch.zeros(len(words), TINY["text_states_dim_2"])
        for row, of_one in enumerate(words):
            for column, word in enumerate(of_one):
                seed = int.from_bytes(word.encode()[:4], "little")
                generator = torch.Generator().manual_seed(seed)
                states[row, column] = torch.randn(states.shape[2], generator=generator)
            pooled[row] = states[row].sum(0)[: pooled.shape[1]]
        mask = torch.arange(longest) < torch.tensor([len(of_one) for of_one in words])[:, None]
        return states, mask, pooled


def stage_of(model: HunyuanVideoTransformer, team: Team, kind: str = "flow") -> Any:
    """A stage of five samples a step, images and clips by turns."""
    generator = torch.Generator().manual_seed(5)
    images, clips = (
        LatentSet(torch.randn(9, 4, frames, 4, 6, generator=generator), seed=1, frames=frames)
        for frames in (1, 2)
    )
    drawing: dict[str, Any] = {"scaling_factor": 1.0, "seed": 0, "share": team.share}
    if kind == "flow":
        config = FlowConfig(
            image_steps=1,
            clip_steps=9,
            image_batch=5,
            clip_batch=5,
            image_every=2,
            drop_caption=0.4,
        )
        return FlowStage(model, WordPrompts(), images, clips, config, **drawing)
    teacher = transformer()
    distillation = DistillationConfig(steps=9, batch=5)
    return DistillationStage(model, teacher, WordPrompts(), clips, distillation, **drawing)


@contextmanager
def in_float32() -> Iterator[None]:
    """Without autocast, whose roundings depend on how a batch is dealt out."""
    with mock.patch.object(stages.torch, "autocast", lambda *_: nullcontext()):
        yield


def trained(sizes: dict[str, Any], folder: str, kind: str = "flow") -> dict[str, Tensor]:
    """Whole averages at the end of a run, which goes on from what is in the folder."""
    team, model = Team.of(Layout(**sizes), CPU), transformer()
    team.place(model)
    config = LoopConfig(steps=STEPS, optim=OPTIM, warmup=1, log_every=1, save_every=2)
    with in_float32():
        ema = fit(stage_of(model, team, kind), config, Path(folder), team=team)
    wholes = team.wholes(model)
    return {name: wholes.gather(name, x) for name, x in ema.average.items()}


def reloaded(sizes: dict[str, Any], file: str) -> list[str]:
    """Names of what is not the same, bit for bit, when a state is loaded and gathered again."""
    team, model = Team.of(Layout(**sizes), CPU), transformer()
    team.place(model)
    wholes, stored = team.wholes(model), torch.load(file, weights_only=True)
    optimizers = build_optimizers(model, OPTIM, team, wholes if team.mesh else None)
    states = RunStates(wholes, optimizers, EMA(model, 0.9), team)
    states.load(stored)
    again = states.gather()
    if not team.is_first:
        return []
    return list(differing({key: stored[key] for key in again}, again))


def updated_by_muon(sizes: dict[str, Any]) -> list[str]:
    """Names of weights that are not those of one process after steps of equal gradients."""
    team, model, alone = Team.of(Layout(**sizes), CPU), transformer(), transformer()
    team.place(model)
    wholes = team.wholes(model)
    many, one = build_optimizers(model, MUON, team, wholes), build_optimizers(alone, MUON)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for name, p in alone.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            model.get_parameter(name).grad = wholes.part(name, p.grad)
        for optimizer in (*many, *one):
            optimizer.step()
    pairs = (
        (name, p, wholes.gather(name, model.get_parameter(name)))
        for name, p in alone.named_parameters()
    )
    taken = {name for name, p in alone.named_parameters() if MUON.takes_muon(name, p)}
    assert taken
    return [name for name, p, found in pairs if name in taken and not torch.equal(p, found)]


def differing(a: Any, b: Any, name: str = "state") -> Iterator[str]:
    """Where two nested states differ in structure, in a number or in a bit of a tensor."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
        yield from () if same else (name,)
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differing(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from differing(*pair, f"{name}.{index}")
    elif type(a) is not type(b) or a != b:
        yield name


def shape_of(state: Any, name: str = "state") -> Iterator[tuple[str, Any]]:
    """What is in a nested state, without the numbers of its tensors."""
    if isinstance(state, Tensor):
        yield name, (state.dtype, state.shape)
    elif isinstance(state, dict | list):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in pairs:
            yield from shape_of(value, f"{name}.{key}")
    else:
        yield name, type(state)
