"""``python -m benchmarks`` as a user types it."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.bench_fused_modulation import _case
from benchmarks.kit import chart, discover, gate, machine, record, run
from benchmarks.kit.case import PASSES
from benchmarks.kit.chart import draw
from benchmarks.kit.gate import Verdict, run_tests
from benchmarks.kit.pairing import Rounds
from benchmarks.kit.table import number, remarks, show
from tests.benchmarks.fakes import measurement, result, timing


def test_an_unknown_op_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as leaving:
        command.main(["fused_modulation", "gelu_thanh"])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "no benchmark for gelu_thanh" in error
    assert all(op in error.splitlines()[-1] for op in discover.ops())


def test_bad_usage_is_told_before_torch_is_loaded():
    code = (
        "import sys\nfrom benchmarks.__main__ import main\n"
        "try:\n    main(['nonsense'])\nexcept SystemExit as leaving:\n"
        "    print(leaving.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=discover.ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "False"], done.stderr


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A benchmark of one tiny case, with results in a folder of the test's own."""
    case = _case("small", 12, 32, torch.float32, alternating=True)
    eager = [peer for peer in case.peers if peer.name == "eager"]
    cases = [replace(case, peers=tuple(eager))]
    monkeypatch.setattr(run, "load", lambda op: SimpleNamespace(cases=lambda *_, **__: cases))
    monkeypatch.setattr(run, "THOROUGH", Rounds(0.0, 2, 2))
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)
    return tmp_path


def verdict(monkeypatch, passed, summary="3 passed"):
    monkeypatch.setattr(gate, "run_tests", lambda op: Verdict(passed, summary))


def test_a_green_op_is_measured_shown_saved_and_drawn(small, monkeypatch, capsys):
    verdict(monkeypatch, True)
    assert command.main(["fused_modulation", "--device", "cpu"]) == 0
    (path,) = small.glob("results/*/fused_modulation.json")
    kept = record.load(path)
    assert [m.what for m in kept.measurements] == list(PASSES)
    assert kept.tests == "passed" and not kept.quick
    assert kept.source.command == "python -m benchmarks fused_modulation --device cpu"
    assert kept.machine.slug == path.parent.name
    assert {a.kind for a in kept.alternations} == {"ours", "peer"}
    if chart.can_draw():
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for word in ("reference", "eager", "floor (memory)", "x best peer", "3 passed"):
        assert word in shown


def test_a_red_op_is_refused(small, monkeypatch, capsys):
    verdict(monkeypatch, False, "FAILED test_forward[cpu_impl]")
    assert command.main(["fused_modulation", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED test_forward[cpu_impl]" in shown
    assert "not measured, because its tests do not pass" in shown
    assert not list(small.rglob("*.json"))


def test_without_tests_a_run_is_no_evidence(small, monkeypatch):
    monkeypatch.setattr(gate, "run_tests", lambda op: pytest.fail("asked not to"))
    assert command.main(["fused_modulation", "--device", "cpu", "--skip-test"]) == 0
    assert list(small.glob("scratch/*/*.json")) and not list(small.glob("results/*/*.json"))


def test_one_failing_op_does_not_stop_the_others(small, monkeypatch, capsys):
    verdict(monkeypatch, True)
    good = run.load

    def load(op):
        if op == "fused_modulation":
            raise RuntimeError("a benchmark that breaks")
        return good(op)

    monkeypatch.setattr(run, "load", load)
    monkeypatch.setattr(discover, "ops", lambda: ("fused_modulation", "other"))
    seen = []
    measure = command._measure
    monkeypatch.setattr(command, "_measure", lambda op, o: (seen.append(op), measure(op, o))[1])
    monkeypatch.setattr(run, "run", _only_load(run.run))
    assert command.main([]) == 1
    assert seen == ["fused_modulation", "other"]
    assert "failed: fused_modulation" in capsys.readouterr().out


def _only_load(real):
    """``run`` of a made-up op: it is loaded as ever and measured as fused_modulation."""

    def replacement(op, *args, **more):
        run.load(op)
        return replace(result(), op=op, quick=True)

    return replacement


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    verdict(monkeypatch, True)
    assert command.main(["fused_modulation", "--device", "cuda"]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    return tmp_path / "tests" / "ops"


def test_the_gate_runs_the_tests_of_the_op(tree, monkeypatch):
    monkeypatch.setattr(gate, "ops", lambda: ("scale", "scale_up"))
    (tree / "test_scale.py").write_text("def test_it():\n    assert 1 + 1 == 2\n")
    (tree / "test_scale_up.py").write_text("def test_it():\n    assert False\n")
    root = tree.parents[1]
    green = run_tests("scale", root)
    assert green.passed and "1 passed" in green.summary
    (tree / "test_scale_edges.py").write_text("def test_edge():\n    assert 1 > 2\n")
    red = run_tests("scale", root)
    assert not red.passed and "test_edge" in red.summary


def test_the_gate_is_shut_without_tests(tree):
    root = tree.parents[1]
    assert "test_scale.py does not exist" in run_tests("scale", root).summary
    (tree / "test_scale.py").write_text("")
    assert not run_tests("scale", root).passed


def test_a_whole_has_its_tests_by_name(tmp_path):
    for op in discover.WHOLES:
        assert gate.test_files(op) and all(path.is_file() for path in gate.test_files(op))
    refused = run_tests("dit_blocks", tmp_path)
    assert not refused.passed and refused.summary == "tests/models/test_dit.py does not exist"


def test_the_table_says_what_is_not_evidence():
    assert remarks(result()) == []
    doubtful = result(neighbours=0.5, tests="skipped", quick=True)
    shared, untested, quick = remarks(doubtful)
    assert "took 50% of its cores" in shared
    assert "not run" in untested and "Quick" in quick


def test_the_table_shows_rates_memory_and_reasons():
    console = Console(width=120, record=True, file=io.StringIO())
    timings = [timing("cuda_impl", answers=True, peak_mib=123.0), timing("sdpa", "peer", 4.0)]
    compute = measurement(timings=timings, best_peer="sdpa", bound="compute", num_flops=10**10)
    declined = {"eager": "OutOfMemoryError: [Tried] to allocate"}
    show(result(measurements=[replace(compute, declined=declined)]), console)
    text = console.export_text()
    assert "TFLOP/s" in text and "123" in text and "5.00" in text
    assert "eager: OutOfMemoryError: [Tried] to allocate" in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123456.0, "123456")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_chart_has_a_panel_for_every_measurement(tmp_path):
    pytest.importorskip("matplotlib")
    measurements = [measurement(), measurement(what="forward+backward"), measurement(case="nano")]
    draw(result(measurements=measurements), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_results_are_plain_json(tmp_path):
    record.save(result(), tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    wanted = {"device", "driver", "cpu", "threads", "torch", "python"}
    assert wanted <= data["machine"].keys()
    assert {"commit", "date", "command"} <= data["source"].keys()


def test_cases_are_chosen_by_what_they_are_called(small, monkeypatch, capsys):
    verdict(monkeypatch, True)
    asked = ["fused_modulation", "--device", "cpu", "--only"]
    assert command.main([*asked, "small float32"]) == 0
    (path,) = small.glob("results/*/fused_modulation.json")
    assert len(record.load(path).measurements) == len(PASSES)
    assert command.main([*asked, "large"]) == 1
    assert "no case holds 'large'; there are" in capsys.readouterr().err


def test_what_is_missing_is_measured_and_kept_pass_by_pass(small, monkeypatch, capsys):
    verdict(monkeypatch, True)
    asked = ["fused_modulation", "--device", "cpu", "--missing"]
    real, measured = run.measure, []

    def measure(op, case, what, setting):
        if len(measured) == 1:
            measured.append("interrupted")
            raise RuntimeError("the power went out")
        measured.append(what)
        return real(op, case, what, setting)

    monkeypatch.setattr(run, "measure", measure)
    assert command.main(asked) == 1
    (path,) = small.glob("results/*/fused_modulation.json")
    first = record.load(path).measurements
    assert [m.what for m in first] == list(PASSES)[:1]
    assert command.main(asked) == 0
    assert measured == [PASSES[0], "interrupted", *PASSES[1:]]
    whole = record.load(path)
    assert [m.what for m in whole.measurements] == list(PASSES)
    assert whole.measurements[0] == first[0]
    assert command.main(asked) == 0 and "has every case" in capsys.readouterr().out
    assert record.at_hand(path, whole.machine, whole.source) == whole
    assert record.at_hand(path, whole.machine, replace(whole.source, commit="another")) is None


@pytest.mark.parametrize(
    ("steps", "passed"),
    [
        ({"test scale": "green"}, True),
        ({"test scale": "green", "test scale cuda": "green"}, True),
        ({"test scale": "green", "test scale cuda": "red"}, False),
        ({"test scale": "green", "test scale cuda": "skipped"}, False),
        ({"test scale cuda": "green"}, False),
        ({"test other": "green"}, False),
    ],
)
def test_the_gate_takes_the_word_of_who_has_tested(tmp_path, steps, passed):
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"steps": {k: {"verdict": v} for k, v in steps.items()}}))
    found = gate.seen_by(state, "scale")
    assert found.passed is passed and "has tested scale" in found.summary
    state.write_text(json.dumps({"steps": {"test wholes": {"verdict": "green"}}}))
    assert gate.seen_by(state, "vae").passed and not gate.seen_by(state, "scale").passed
    state.write_text("{")
    assert "is no state of scripts/gpu.py" in gate.seen_by(state, "vae").summary


def test_a_copy_without_git_may_name_its_commit(monkeypatch):
    monkeypatch.setattr(machine, "_git", lambda *_: None)
    monkeypatch.delenv("HUNYUAN_FAST_COMMIT", raising=False)
    assert machine.describe_source("vae", "").commit is None
    monkeypatch.setenv("HUNYUAN_FAST_COMMIT", "0123456789" * 4)
    source = machine.describe_source("vae", "")
    assert (source.commit, source.clean) == ("0123456789" * 4, True)
    monkeypatch.setenv("HUNYUAN_FAST_COMMIT", "main")
    with pytest.raises(ValueError, match="40 hexadecimal digits, got 'main'"):
        machine.describe_source("vae", "")
