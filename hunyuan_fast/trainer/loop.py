"""The training loop of one stage: deterministic by step, interruptible, resumed bit for bit.

A stage draws everything it needs (data, noise, timesteps) from (seed, stage, step), never from a
running generator. A state on disk is therefore weights, optimiser moments, averages and the step.
"""

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor, nn

from hunyuan_fast.trainer.checkpoint import CheckpointFolder, write_atomically
from hunyuan_fast.trainer.ema import EMA
from hunyuan_fast.trainer.optim import OptimConfig, build_optimizers, clip_gradients
from hunyuan_fast.trainer.schedule import warmup_cosine
from hunyuan_fast.trainer.states import RunStates
from hunyuan_fast.trainer.team import Team

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as ``progress(stage, finished steps, all steps, figures)`` after every logged step."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the stage, the step and what to do."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a stage trains and what it writes; steps are optimiser steps."""

    steps: int
    optim: OptimConfig
    warmup: int = 100
    ema_decay: float = 0.999
    log_every: int = 20
    save_every: int = 250
    max_bad_steps: int = 5


class Stage(Protocol):
    """What the loop trains. ``loss(step)`` must depend on the step alone.

    Of several processes each gives its share: the means over all are those of the batch.
    """

    name: str

    @property
    def module(self) -> nn.Module:
        """The network whose parameters are trained."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The scalar loss of a step, and figures to log beside it."""
        ...


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The random source of one step of one stage."""
    mixed = hash_seed(seed, stage, step)
    return torch.Generator().manual_seed(mixed)


def hash_seed(*parts: int | str) -> int:
    """A 63-bit seed from a few parts, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels within the block; the setting found comes back afterwards.

    cuBLAS is deterministic only with workspaces of a fixed size, which the environment names before
    the first product of the process: those of its documentation, unless there are others.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # poisoning fresh memory is for tests: it costs a pass over every activation here
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside the block only raises a flag, so that no step is left half done.

    Yields a function that tells whether Ctrl-C came. Outside the main thread nothing changes.
    """
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


class _Run:
    """One stage being trained: what is saved, restored and stepped."""

    def __init__(self, stage: Stage, config: LoopConfig, folder: Path, team: Team) -> None:
        self.stage = stage
        self.config = config
        self.team = team
        self.states = CheckpointFolder(folder / stage.name)
        self.log = folder / stage.name / "log.jsonl"
        self.wholes = team.wholes(stage.module)
        wholes = self.wholes if team.mesh is not None else None
        self.optimizers = build_optimizers(stage.module, config.optim, team, wholes)
        self.peaks = [group["lr"] for opt in self.optimizers for group in opt.param_groups]
        self.ema = EMA(stage.module, config.ema_decay)
        self.kept = RunStates(self.wholes, self.optimizers, self.ema, team)
        self.step = 0
        self.seconds = 0.0
        self.bad_steps = 0
        self.window: dict[str, list[float]] = {}

    def save(self) -> None:
        state = self.kept.gather()
        if not self.team.is_first:
            return
        state |= {"seconds": self.seconds, "bad_steps": self.bad_steps, "window": self.window}
        self.states.save(self.step, state)

    def restore(self) -> None:
        """Go back to the newest sound state, and drop log lines written after it."""
        newest = self.team.by_first(self.states.newest)
        if newest is None:
            return
        self.step, state = newest, self.states.load(newest)
        self.kept.load(state)
        self.seconds, self.bad_steps = state["seconds"], state["bad_steps"]
        self.window = state["window"]
        if self.team.is_first and self.log.is_file():
            lines = [
                line
                for line in self.log.read_text().splitlines()
                if json.loads(line)["step"] <= self.step
            ]
            write_atomically(self.log, "".join(f"{line}\n" for line in lines))

    def open_log(self) -> TextIO:
        """The log, to append to; that of all processes but the first goes nowhere."""
        if not self.team.is_first:
            return Path(os.devnull).open("a")
        self.states.folder.mkdir(parents=True, exist_ok=True)
        return self.log.open("a")

    def close_window(self) -> dict[str, float]:
        """Means of the figures since the last log line; a figure counts the steps that gave it."""
        means = {name: sum(values) / len(values) for name, values in self.window.items()}
        self.window = {}
        return {name: float(f"{value:.6g}") for name, value in means.items()}

    def _set_lr(self) -> float:
        factor = warmup_cosine(self.step, steps=self.config.steps, warmup=self.config.warmup)
        groups = [group for opt in self.optimizers for group in opt.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return groups[0]["lr"]

    def advance(self) -> dict[str, float]:
        """One optimiser step; a step whose gradient is not finite is skipped and counted."""
        lr = self._set_lr()
        loss, figures = self.stage.loss(self.step)
        loss.backward()
        limit = self.config.optim.max_grad_norm
        norm = clip_gradients(self.stage.module, limit, self.team, self.wholes)
        figures = self.team.means({"loss": loss.item(), **figures})
        # the same on all processes, so that they decide alike
        if math.isfinite(norm) and math.isfinite(figures["loss"]):
            for opt in self.optimizers:
                opt.step()
            self.ema.update()
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            if self.bad_steps >= self.config.max_bad_steps:
                raise TrainingError(
                    f"stage {self.stage.name}, step {self.step}: {self.bad_steps} steps in a row "
                    "with a loss or gradient that is not finite; lower the learning rate and "
                    "resume from the last state"
                )
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": figures.pop("loss"), "lr": lr, "grad_norm": norm, **figures}


def fit(
    stage: Stage,
    config: LoopConfig,
    folder: Path,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    team: Team | None = None,
) -> EMA:
    """Train a stage to ``config.steps`` and return the averaged weights, already in the module.

    folder: gets ``<stage>/state-*.pt`` and ``<stage>/log.jsonl`` (step, means of the loss
        and of the figures since the line before, seconds).
    resume: continue from the newest state in the folder; otherwise its presence is an error.
    team: the processes that train together, all of which call this, on a module that is shared
        already. The first one writes; the state goes on in any layout. All must see the folder.
    Ctrl-C saves the state of the last finished step before KeyboardInterrupt goes on.
    Raises TrainingError when the loss stays non-finite, ValueError for damaged or unwanted states.
    """
    team = team or Team()
    run = _Run(stage, config, folder, team)
    if team.by_first(run.states.steps) and not resume:
        raise ValueError(
            f"{run.states.folder} already holds a training state: resume, or name a fresh folder"
        )
    run.restore()
    stage.module.train()
    with deterministic(), deferred_interrupt() as interrupted, run.open_log() as log:
        while run.step < config.steps:
            started = time.perf_counter()
            figures = run.advance()
            run.seconds += time.perf_counter() - started
            for name, value in figures.items():
                run.window.setdefault(name, []).append(value)
            if run.step % config.log_every == 0 or run.step == config.steps:
                means = run.close_window()
                log.write(json.dumps({"step": run.step, **means, "seconds": round(run.seconds, 2)}))
                log.write("\n")
                log.flush()
                if progress is not None:
                    progress(stage.name, run.step, config.steps, means)
            stopped = team.any(interrupted())
            if run.step % config.save_every == 0 or run.step == config.steps or stopped:
                run.save()
            if stopped:
                raise KeyboardInterrupt(
                    f"stage {stage.name} is saved after step {run.step}; resume to go on from there"
                )
    stage.module.eval()
    run.ema.copy_to_module()
    return run.ema
