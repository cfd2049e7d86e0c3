"""The loop: deterministic by step, resumed bit for bit, honest about bad steps."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from hunyuan_fast.trainer.loop import (
    LoopConfig,
    TrainingError,
    deterministic,
    fit,
    hash_seed,
    step_generator,
)
from hunyuan_fast.trainer.optim import OptimConfig

STEPS = 12


class Regression:
    """A small network with matrices and vectors, so that both optimisers have work."""

    name = "toy"

    def __init__(self, *, bad_from: int | None = None, interrupt_at: int | None = None):
        torch.manual_seed(3)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
        self.bad_from = bad_from
        self.interrupt_at = interrupt_at

    def loss(self, step):
        generator = step_generator(0, self.name, step)
        x = torch.randn(16, 4, generator=generator)
        loss = (self.module(x) - x[:, :2].sin()).square().mean()
        if self.bad_from is not None and step >= self.bad_from:
            loss = loss * float("nan")
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss, {"half": loss.item() / 2}


def config(steps=STEPS, save_every=100, log_every=1):
    optim = OptimConfig(lr=1e-2, muon_lr=1e-2)
    return LoopConfig(
        steps=steps, optim=optim, warmup=3, log_every=log_every, save_every=save_every
    )


def trained(folder, **kwargs):
    stage = Regression(**kwargs)
    fit(stage, config(), folder)
    return [p.detach().clone() for p in stage.module.parameters()]


def log_of(folder):
    lines = (folder / "toy" / "log.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder), log_of(folder)


@pytest.mark.parametrize("cut", range(STEPS))
def test_an_interrupted_run_ends_in_the_same_weights(cut, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=f"after step {cut + 1}"):
        fit(Regression(interrupt_at=cut), config(), tmp_path)
    weights = trained(tmp_path)

    assert all(torch.equal(a, b) for a, b in zip(weights, whole[0], strict=True))
    assert log_of(tmp_path) == whole[1]


def test_a_log_line_is_the_mean_of_its_steps_even_across_an_interruption(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(interrupt_at=5), config(log_every=4), tmp_path)
    fit(Regression(), config(log_every=4), tmp_path)
    losses = [loss for _, loss in whole[1]]
    assert [step for step, _ in log_of(tmp_path)] == [4, 8, 12]
    means = [sum(losses[first : first + 4]) / 4 for first in (0, 4, 8)]
    assert [loss for _, loss in log_of(tmp_path)] == pytest.approx(means, rel=1e-4)


def test_two_interruptions_end_in_the_same_weights(whole, tmp_path):
    for cut in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            fit(Regression(interrupt_at=cut), config(), tmp_path)
    weights = trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights, whole[0], strict=True))


def test_a_killed_run_repeats_the_steps_after_its_last_state(whole, tmp_path):
    """A crash between states loses steps, not exactness; log lines of the lost steps go too."""

    class Crash(Regression):
        def loss(self, step):
            if step == 7:
                raise MemoryError("killed")
            return super().loss(step)

    with pytest.raises(MemoryError):
        fit(Crash(), config(save_every=3), tmp_path)
    assert [step for step, _ in log_of(tmp_path)] == list(range(1, 8))
    weights = trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights, whole[0], strict=True))
    assert log_of(tmp_path) == whole[1]


def test_training_lowers_the_loss(tmp_path):
    stage = Regression()
    fresh = [step + 1000 for step in range(20)]
    before = sum(stage.loss(step)[0].item() for step in fresh)
    fit(stage, config(steps=200), tmp_path)
    assert sum(stage.loss(step)[0].item() for step in fresh) < 0.5 * before


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    trained(tmp_path)

    class Untouchable(Regression):
        def loss(self, step):
            raise AssertionError("a finished stage took another step")

    stage = Untouchable()
    fit(stage, config(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(stage.module.parameters(), whole[0], strict=True))


def test_a_bad_step_changes_no_weight_and_many_end_the_run(tmp_path):
    stage = Regression(bad_from=0)
    before = [p.detach().clone() for p in stage.module.parameters()]
    with pytest.raises(TrainingError, match="stage toy, step 4: 5 steps in a row"):
        fit(stage, config(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(stage.module.parameters(), before, strict=True))


def test_a_folder_in_use_is_refused_without_resume(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match="already holds a training state"):
        fit(Regression(), config(), tmp_path, resume=False)


def test_seeds_depend_on_every_part():
    seeds = {hash_seed(a, b, c) for a in (0, 1) for b in ("x", "y") for c in (0, 1)}
    assert len(seeds) == 8
    assert hash_seed(0, "x", 0) == 93338541736315554  # the same on every machine


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_products_on_a_gpu_have_workspaces_of_fixed_size(given, monkeypatch):
    """Without them cuBLAS refuses every product of a deterministic run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (given or ":4096:8")
