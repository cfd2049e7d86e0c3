"""Training over a layout: the batches, the losses and the weights of one process, on any disk."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.trainer.share import Share
from tests.distributed import parallel_training_cases as cases
from tests.kit.ranks import RankFailed, RankPool

# Every layout goes on from what the one before it has left halfway.
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"dp": 2, "cp": 2},
    {"dp": 3, "zero": 1},
    {"dp": 2, "tp": 2, "zero": 3},
    {"cp": 3, "zero": 2},
    {"cp": 2, "tp": 2, "zero": 1},
)
MUON_LAYOUTS: tuple[dict[str, Any], ...] = ({"dp": 2, "zero": 1}, {"dp": 2, "tp": 2, "zero": 2})


def count(sizes: dict[str, Any]) -> int:
    return math.prod(sizes.get(name, 1) for name in ("dp", "cp", "tp"))


def log_of(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


class Alone:
    """The run of one process: its folder, log and averages."""

    def __init__(self, ranks: RankPool, folder: Path, kind: str = "flow") -> None:
        self.folder, self.kind = folder, kind
        (self.average,) = ranks.run(1, cases.trained, {}, str(folder), kind)

    def check(self, ranks: RankPool, sizes: dict[str, Any], folder: Path) -> None:
        """Train by a layout in a folder, and compare."""
        found = ranks.run(count(sizes), cases.trained, sizes, str(folder), self.kind)
        for average in found:
            assert worst(average, self.average) <= 1e-6
        stage = "dit" if self.kind == "flow" else "guidance"
        for line, wanted in zip(log_of(folder, stage), log_of(self.folder, stage), strict=True):
            assert line == pytest.approx(wanted, rel=2e-5)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(ranks, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def runs(
    ranks: RankPool, alone: Alone, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """The folder of each layout, trained from the beginning; -1 is that of one process."""
    folders = {-1: alone.folder}
    for index, sizes in enumerate(LAYOUTS):
        folders[index] = tmp_path_factory.mktemp("run")
        alone.check(ranks, sizes, folders[index])
    return folders


def state_of(folder: Path) -> Path:
    return folder / "dit" / "state-2.pt"


def test_the_run_of_one_process(runs: dict[int, Path]) -> None:
    assert len(runs) == len(LAYOUTS) + 1


@pytest.mark.parametrize("index", (0, 2, 4), ids=lambda index: str(LAYOUTS[index]))
def test_another_layout_goes_on(
    ranks: RankPool, alone: Alone, runs: dict[int, Path], tmp_path: Path, index: int
) -> None:
    before = runs[index - 1]
    for name in ("state-2.pt", "state-2.json", "log.jsonl"):
        (tmp_path / "dit").mkdir(exist_ok=True)
        shutil.copy(before / "dit" / name, tmp_path / "dit" / name)
    alone.check(ranks, LAYOUTS[index], tmp_path)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_states_are_those_of_one_process(
    ranks: RankPool, runs: dict[int, Path], index: int
) -> None:
    """What any layout has stored is loaded by the next one and gathered again, bit for bit."""
    sizes = LAYOUTS[index]
    assert ranks.run(count(sizes), cases.reloaded, sizes, str(state_of(runs[index - 1])))[0] == []
    stored, wanted = (torch.load(state_of(runs[i]), weights_only=True) for i in (index, -1))
    assert dict(cases.shape_of(stored)) == dict(cases.shape_of(wanted))


@pytest.mark.parametrize("sizes", MUON_LAYOUTS, ids=str)
def test_muon_sees_whole_matrices(ranks: RankPool, sizes: dict[str, Any]) -> None:
    """Of the same gradients it makes the same updates; its roundings forbid to compare runs."""
    assert ranks.run(count(sizes), cases.updated_by_muon, sizes) == [[]] * count(sizes)


def test_muon_is_refused_where_it_is_not_exact(ranks: RankPool) -> None:
    sizes = {"dp": 2, "tp": 2, "zero": 1}
    with pytest.raises(RankFailed, match="muon_lr must be None with zero = 1 and tp = 2"):
        ranks.run(4, cases.updated_by_muon, sizes)


def test_distillation(ranks: RankPool, tmp_path: Path) -> None:
    alone = Alone(ranks, tmp_path / "alone", "distillation")
    alone.check(ranks, {"dp": 2, "zero": 2}, tmp_path / "many")


@pytest.mark.parametrize("batch", (1, 2, 5, 8))
@pytest.mark.parametrize("processes", (1, 2, 3, 4))
def test_shares_make_up_the_mean(batch: int, processes: int) -> None:
    losses = torch.rand(batch, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    shares = [Share(index, processes) for index in range(processes)]
    parts = [losses[share.rows(batch)].mean() * share.weight(batch) for share in shares]
    assert all(losses[share.rows(batch)].numel() for share in shares)
    assert abs(sum(parts) / processes - losses.mean()) < 1e-15
