"""How a ranking that was measured here becomes the committed one."""

from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.kit import rankings
from benchmarks.kit.discover import RESULTS
from benchmarks.kit.rankings import NotCommitted, commit, proven, verify
from benchmarks.kit.record import load
from hunyuan_fast import dispatch, ranking
from hunyuan_fast.ranking import Entry, Section
from tests.benchmarks.fakes import result

ROOM = "rope3d_attention"


def entry(octave: int, ms: dict[str, float], error: dict[str, float] | None = None) -> Entry:
    error = dict.fromkeys(ms, 0.5) | (error or {})
    declined = {name: "disagrees" for name, e in error.items() if e > 1} | {"absent": "not here"}
    return Entry((torch.bfloat16, 128, octave, False, False), "a call", ms, error, declined)


def section(*entries: Entry) -> Section:
    return Section(ROOM, "sm_90", "NVIDIA H200", ranking.software(ROOM), "2026-03-04", [*entries])


@pytest.fixture
def evidence():
    made = result(op=ROOM)
    machine = replace(made.machine, arch="sm_90", device="NVIDIA H200")
    return replace(made, machine=machine, tests="passed", quick=False)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The committed file, and modules to verify, elsewhere."""
    monkeypatch.setattr(ranking, "committed_file", lambda op: tmp_path / "ranking.json")
    verified = []
    monkeypatch.setattr(rankings, "verify", lambda path, arch: verified.append(path.stem) or True)
    return tmp_path / "ranking.json", verified


FAST = {"library_impl.cudnn": 1.0, "library_impl.flash": 2.0, "reference": 9.0}


def test_what_was_measured_is_written_and_verified(room, evidence):
    path, verified = room
    said = commit([section(entry(12, FAST))], [evidence])
    (kept,) = ranking.load(path)
    assert kept.arch == "sm_90" and kept.entries[0].ranked()[0] == "library_impl.cudnn"
    assert kept.entries[0].declined == {}
    assert verified == ["cudnn", "flash", "reference"]
    assert said[0] == "rope3d_attention on sm_90: wrote ranking.json" and len(said) == 4


def test_without_evidence_nothing_is_written(room, evidence):
    path, verified = room
    machine = evidence.machine
    for other in (
        replace(evidence, tests="skipped"),
        replace(evidence, quick=True),
        replace(evidence, op="gelu_tanh"),
        replace(evidence, machine=replace(machine, device="NVIDIA A100")),
        replace(evidence, machine=replace(machine, arch="sm_80")),
    ):
        with pytest.raises(NotCommitted, match="python -m benchmarks rope3d_attention"):
            commit([section(entry(12, FAST))], [other])
    stale = replace(section(entry(12, FAST)), software={"torch": "1"})
    with pytest.raises(NotCommitted, match="--tune --backward"):
        commit([stale], [evidence])
    assert not path.exists() and not verified


def test_who_was_wrong_once_or_slow_is_not_proven():
    made = section(
        entry(12, FAST | {"cuda_impl": 0.5, "triton_impl": 20.0}),
        entry(13, FAST, {"cuda_impl": 1.5}),
    )
    assert proven(made) == ["library_impl.cudnn", "library_impl.flash", "reference"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("VERIFIED_ON: frozenset[str] = frozenset()", 'VERIFIED_ON = frozenset({"sm_90"})'),
        ("VERIFIED_ON = frozenset()", 'VERIFIED_ON = frozenset({"sm_90"})'),
        ('VERIFIED_ON = frozenset({"cpu"})', 'VERIFIED_ON = frozenset({"cpu", "sm_90"})'),
        ('VERIFIED_ON = frozenset({"sm_90"})', None),
        ('VERIFIED_ON = frozenset({"*"})', None),
        ("VERIFIED_ON = a.VERIFIED_ON | b.VERIFIED_ON", None),
    ],
)
def test_an_architecture_is_added_to_a_module(before, after, tmp_path):
    path = tmp_path / "cuda_impl.py"
    text = '"""A kernel."""\n\n{}\n\n\ndef forward(): ...\n'
    path.write_text(text.format(before))
    assert verify(path, "sm_90") == (after is not None)
    assert path.read_text() == text.format(after or before)


@pytest.mark.parametrize("op", [op for op in dispatch.ops() if ranking.is_ranked(op)])
def test_a_committed_ranking_has_a_result_of_its_device(op):
    results = [load(path) for path in sorted(RESULTS.glob("*/*.json"))]
    for each in ranking.load(ranking.committed_file(op)):
        rankings._need_evidence(each, results)


def test_the_command_tells_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HUNYUAN_FAST_CACHE", str(tmp_path))
    assert command.main(["--commit-ranking"]) == 1
    assert "--tune --backward" in " ".join(capsys.readouterr().out.split())
