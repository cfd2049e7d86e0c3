"""``hunyuan-fast plan --measure``: rates of a device, written, and plans held against its clock."""

from pathlib import Path

import pytest
import torch

from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.pipelines import probe
from hunyuan_fast.planning.hardware import read_hardware
from hunyuan_fast.planning.work import Job


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little of everything: what is tested is how it is put together."""
    config = TransformerConfig(hidden_size=64, heads_num=2, rope_dim_list=(8, 12, 12))

    def narrow(height: int, width: int, frames: int, **more: int) -> Job:
        return Job(model="narrow", config=config, height=height, width=width, frames=frames, **more)

    monkeypatch.setattr(probe, "released", narrow)
    monkeypatch.setattr(probe, "_WIDTH", 64)
    monkeypatch.setattr(probe, "_HEAD", 16)
    monkeypatch.setattr(probe, "_NANO_SIZES", ((96, 96, 17), (32, 32, 5)))
    monkeypatch.setattr(probe, "_ROUNDS", 1)
    monkeypatch.setattr(probe, "_LEAST_SAMPLE", 1e-3)


def test_rates_and_the_clock(small: None) -> None:
    seen = []
    hardware = probe.probe(torch.device("cpu"), torch.float32, lambda *step: seen.append(step))
    assert max(hardware.gemm, hardware.attention, hardware.attention_backward, hardware.conv) == 1
    assert hardware.node == 1 and hardware.memory_gib > 0.5
    rows = probe.compare(hardware, torch.device("cpu"), torch.float32)
    assert len(rows) == 8 and len({row.name for row in rows}) == 8
    for row in rows:
        assert row.measured > 0 and row.predicted > 0
        assert row.error == row.predicted / row.measured - 1
    assert seen[-1] == ("rates", 6, 6)


def test_the_command_writes_what_a_plan_reads(small: None, cli, tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    done = cli("plan", "--measure", path, "--device", "cpu")
    assert done.status == 0 and "measured  predicted      error" in done.out
    assert "nano, 244 tokens, forward and backward" in done.out
    assert read_hardware(path).tile == 1
    assert cli("plan", "--measure", path, "--device", "cpu").status == 1  # it exists
    planned = cli("plan", "--hardware", path, "--gpus", "1", "--model", "nano")
    assert planned.status == 0 and "CPU" in planned.out
