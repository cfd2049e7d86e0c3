"""Who may answer on a device because of a committed result."""

from dataclasses import replace

import pytest

from benchmarks import __main__ as command
from benchmarks.kit import record, verified
from benchmarks.kit.verified import commit
from tests.benchmarks.fakes import measurement, result, timing

ROOM = "gelu_tanh"
UNVERIFIED = "VERIFIED_ON: frozenset[str] = frozenset()\n"
VERIFIED = 'VERIFIED_ON = frozenset({"sm_90"})\n'


@pytest.fixture
def room(tmp_path):
    folder = tmp_path / "kernels" / ROOM
    folder.mkdir(parents=True)
    for name in ("cuda_impl", "triton_impl"):
        (folder / f"{name}.py").write_text(UNVERIFIED)
    (folder / "reference.py").write_text('VERIFIED_ON = frozenset({"*"})\n')
    return folder


def on_hopper(*cases: dict[str, float], **changes):
    made = result(op=ROOM, tests="passed", quick=False, **changes)
    measured = [
        measurement(
            case=f"case-{i}",
            best_peer=None,
            timings=[timing(name, ms=ms) for name, ms in each.items()],
        )
        for i, each in enumerate(cases)
    ]
    machine = replace(made.machine, arch="sm_90", device="NVIDIA H200")
    source = replace(made.source, clean=True)
    return replace(made, machine=machine, source=source, measurements=measured)


def is_verified(room, name):
    text = (room / f"{name}.py").read_text()
    assert text in (UNVERIFIED, VERIFIED)
    return text == VERIFIED


def test_whoever_is_not_slower_than_those_behind_is_verified(room, tmp_path):
    said = commit([on_hopper({"cuda_impl": 1.0, "triton_impl": 2.0, "reference": 9.0})], tmp_path)
    assert is_verified(room, "cuda_impl") and is_verified(room, "triton_impl")
    assert said == [
        "gelu_tanh on sm_90: cuda_impl is verified",
        "gelu_tanh on sm_90: triton_impl is verified",
    ]


def test_a_kernel_that_comes_first_and_is_slower_stays_unverified(room, tmp_path):
    cases = (
        {"cuda_impl": 4.0, "triton_impl": 2.0, "reference": 9.0},
        {"cuda_impl": 1.0, "triton_impl": 1.5, "reference": 9.0},
    )
    said = commit([on_hopper(*cases)], tmp_path)
    assert not is_verified(room, "cuda_impl") and is_verified(room, "triton_impl")
    assert said[0].endswith("not verified, triton_impl is 1.15 times as fast over 2 measurements")
    assert said[1].endswith(
        "triton_impl is 2.00 times as fast as cuda_impl at scale case-0 float32 forward"
    )


def test_slower_than_the_reference_is_not_verified(room, tmp_path):
    said = commit([on_hopper({"triton_impl": 9.5, "reference": 9.0})], tmp_path)
    assert not is_verified(room, "triton_impl") and len(said) == 1
    # nobody to compare with: the reference was too slow to be timed
    commit([on_hopper({"triton_impl": 9.5})], tmp_path)
    assert is_verified(room, "triton_impl")


def test_what_is_no_evidence_changes_nothing(room, tmp_path):
    good = on_hopper({"triton_impl": 1.0, "reference": 9.0})
    for other in (
        replace(good, tests="skipped"),
        replace(good, quick=True),
        replace(good, source=replace(good.source, clean=False)),
        replace(good, op="a_whole"),
        replace(good, op="rope3d_attention"),  # ranked: another command's
    ):
        assert commit([other], tmp_path) == []
    assert not is_verified(room, "triton_impl")


def test_what_is_committed_is_what_the_results_say():
    """A second time there is nothing to write: the rooms are as the results at hand have them."""
    results = [record.load(path) for path in sorted(record.RESULTS.glob("*/*.json"))]
    assert not [line for line in commit(results) if line.endswith("is verified")]


def test_the_command_tells_what_it_did(room, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results" / "a-gpu" / f"{ROOM}.json"
    record.save(on_hopper({"triton_impl": 1.0, "reference": 9.0}), path)
    monkeypatch.setattr("benchmarks.kit.discover.RESULTS", tmp_path / "results")
    real = commit
    monkeypatch.setattr(verified, "commit", lambda results: real(results, tmp_path))
    assert command.main(["--commit-verified"]) == 0
    assert "gelu_tanh on sm_90: triton_impl is verified" in capsys.readouterr().out
    assert command.main(["--commit-verified"]) == 0
    assert "nothing to change" in capsys.readouterr().out
