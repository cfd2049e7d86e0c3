"""What is said about the machine, the code and the neighbours."""

import re
import time

import pytest
import torch

from benchmarks.kit import machine
from benchmarks.kit.machine import Neighbours, cache_bytes, is_shared, parse_size


def test_the_machine_is_described():
    described = machine.describe_machine(torch.device("cpu"))
    assert described.arch == "cpu" and described.driver is None
    assert described.device == described.cpu != ""
    assert described.threads == torch.get_num_threads()
    assert described.torch == torch.__version__
    assert re.fullmatch(r"cpu-[a-z0-9-]+-cores", described.slug)


def test_the_source_names_commit_date_and_command():
    source = machine.describe_source("fused_modulation", "python -m benchmarks")
    assert source.commit is None or re.fullmatch(r"[0-9a-f]{40}", source.commit)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", source.date)


@pytest.mark.parametrize(
    ("answers", "clean"),
    [(["a" * 40, ""], True), (["a" * 40, " M kernels/x/reference.py"], False), ([None] * 2, False)],
)
def test_changed_or_unknown_code_is_not_clean(monkeypatch, answers, clean):
    replies = iter(answers)
    monkeypatch.setattr(machine, "_git", lambda *args: next(replies))
    assert machine.describe_source("x", "").clean is clean


def test_a_whole_is_clean_when_all_ops_and_models_are(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "_git", lambda *args: asked.extend(args) or "")
    machine.describe_source("dit_blocks", "")
    assert {"kernels", "csrc", "hunyuan_fast", "benchmarks"} <= set(asked)


@pytest.mark.parametrize(("text", "size"), [("32768K", 2**25), ("64M", 2**26), ("512", 512)])
def test_cache_sizes_are_read_as_linux_writes_them(text, size):
    assert parse_size(text) == size


def test_the_last_cache_is_the_largest(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert cache_bytes() == 2**25
    for index, size in enumerate(("48K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_bytes() == 32768 * 2**10


def test_neighbours_are_what_is_busy_besides_us(monkeypatch):
    busy, own, wall = [10.0, 13.0], [5.0, 6.0], [100.0, 102.0]
    monkeypatch.setattr(machine, "_busy_seconds", lambda: busy.pop(0))
    monkeypatch.setattr(machine, "_own_seconds", lambda: own.pop(0))
    monkeypatch.setattr(machine, "_all_cores", lambda: 2)
    monkeypatch.setattr(time, "monotonic", lambda: wall.pop(0))
    # Three seconds of work in two seconds on two cores, of which one was ours.
    assert Neighbours().share() == pytest.approx(0.5)


def test_neighbours_may_be_unknown(monkeypatch):
    monkeypatch.setattr(machine, "_busy_seconds", lambda: None)
    assert Neighbours().share() is None


def test_a_tenth_of_the_machine_is_a_neighbour():
    assert not is_shared(None) and not is_shared(0.05) and is_shared(0.2)
