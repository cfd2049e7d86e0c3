"""Results as files: read back unchanged, refused when anything is off, and sound as committed."""

import json
from dataclasses import replace

import pytest

from benchmarks.kit.contenders import OURS, REFERENCE
from benchmarks.kit.discover import RESULTS, ROOT, SCRATCH
from benchmarks.kit.record import RecordError, dumps, joined, load, loads, path_of, save
from benchmarks.kit.statistics import Spread, geometric_mean
from hunyuan_fast import dispatch
from tests.benchmarks.fakes import constant, measurement, result, timing

COMMITTED = sorted(RESULTS.glob("*/*.json"))


def test_a_result_survives_the_round_trip(tmp_path):
    made = result(measurements=[measurement(), measurement(num_flops=10, matmul_tflop_per_s=1.5)])
    path = tmp_path / "cpu" / "scale.json"
    save(made, path)
    assert load(path) == made
    assert [p.name for p in path.parent.iterdir()] == ["scale.json"]


def test_files_from_before_kept_memory_was_counted_are_read():
    data = json.loads(dumps(result()))
    for each in data["measurements"][0]["timings"]:
        del each["kept_mib"]
    assert loads(json.dumps(data), "scale.json") == result()


def test_figures_have_five_digits():
    made = result(measurements=[measurement(copy_gb_per_s=12.3456789)])
    assert '"copy_gb_per_s": 12.346' in dumps(made)


def test_evidence_and_other_runs_are_kept_apart():
    folder = "cpu-a-processor-r-2-cores"
    assert path_of(result()) == RESULTS / folder / "scale.json"
    assert path_of(result(quick=True)) == SCRATCH / folder / "scale.json"
    assert path_of(result(tests="skipped")) == SCRATCH / folder / "scale.json"
    gpu = result(machine=replace(result().machine, device="NVIDIA H200", arch="sm_90"))
    assert path_of(gpu) == RESULTS / "nvidia-h200" / "scale.json"


def test_some_cases_join_the_others_of_the_same_code_and_machine(tmp_path):
    path = tmp_path / "scale.json"
    old = result(measurements=[measurement(case="a"), measurement(case="b", num_bytes=1)])
    new = result(measurements=[measurement(case="b", num_bytes=2)], neighbours=0.5)
    new = replace(new, source=replace(new.source, command="python -m benchmarks scale --only b"))
    assert joined(new, path) == new
    save(old, path)
    both = joined(new, path)
    assert [(m.case, m.num_bytes) for m in both.measurements] == [
        ("a", measurement().num_bytes),
        ("b", 2),
    ]
    assert both.neighbours == 0.5
    assert both.source.command == f"{old.source.command}; python -m benchmarks scale --only b"
    save(both, path)
    assert joined(new, path) == both
    for foreign in (
        replace(new, source=replace(new.source, commit="another")),
        replace(new, machine=replace(new.machine, threads=97)),
    ):
        assert joined(foreign, path) == foreign


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(dumps(result())), **changes})


def without(name: str) -> str:
    data = json.loads(dumps(result()))
    del data[name]
    return json.dumps(data)


def of(**changes: object) -> str:
    return dumps(result(measurements=[measurement(**changes)]))


TWO_ANSWERS = [timing(name, answers=True) for name in ("cpu_impl", "reference")]
TIMED_TWICE = [timing("cpu_impl", answers=True), timing("cpu_impl")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "version must be 1"),
        (edited(version=0), "version must be 1"),
        (edited(op=3), "result.op must be str, got 3"),
        (edited(quick="no"), "result.quick must be bool, got 'no'"),
        (edited(neighbours="many"), "result.neighbours must be float"),
        (edited(machine=None), "result.machine must be an object"),
        (edited(colour="red"), "result has unknown colour"),
        (edited(measurements={}), "result.measurements must be list"),
        (edited(measurements=[{}]), r"result.measurements\[0\] lacks best_peer"),
        (edited(tests="perhaps"), "tests must be passed or skipped"),
        (edited(measurements=[]), "measurements must not be empty"),
        (without("source"), "result lacks source"),
        (of(what="sideways"), "what must be one of forward"),
        (of(timings=TWO_ANSWERS, best_peer=None), "one implementation answers, or none"),
        (of(timings=[timing("a", "peer")], best_peer=None), "one of the timings must be ours"),
        (of(timings=TIMED_TWICE, best_peer=None), "names in timings must differ"),
        (of(best_peer="nobody"), "best_peer 'nobody' was not timed"),
        (
            of(timings=[timing("a", "friend", answers=True)], best_peer=None),
            "a must be ours or a peer",
        ),
        (of(floor_ms=constant(0.0)), "floor_ms: expected 0 < low"),
        (
            of(timings=[timing("a", answers=True, of_floor=Spread(1, 2, 3))], best_peer=None),
            "a: expected 0 < low <= median",
        ),
    ],
)
def test_anything_else_is_refused_by_name_and_place(text, message):
    with pytest.raises(RecordError, match=rf"^scale.json: .*{message}"):
        loads(text, "scale.json")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_committed_result_is_evidence(path):
    kept = load(path)
    assert path == path_of(kept), "only thorough runs after green tests are evidence"
    assert kept.source.commit and kept.source.clean, "measure committed code"
    assert kept.source.command.startswith("python -m benchmarks")
    assert path.with_suffix(".png").is_file()
    for private in (str(ROOT), "/home/", "/root/"):
        assert private not in path.read_text()


@pytest.mark.parametrize("op", dispatch.ops())
def test_who_answers_on_a_gpu_has_a_result_there(op):
    """VERIFIED_ON names an architecture only with evidence: timed there, and not the slower one."""
    results = [kept for path in COMMITTED if (kept := load(path)).op == op]
    for name, implementation in dispatch.choices(op).items():
        for arch in sorted(implementation.VERIFIED_ON - {"*", "cpu"}):
            against = [
                each.ms.median / mine.ms.median
                for kept in results
                if kept.machine.arch == arch
                for m in kept.measurements
                for mine in m.timings
                if mine.name == name
                for each in m.timings
                if each.kind == OURS and each.name == REFERENCE
            ]
            assert against, f"{op}: {name} claims {arch} and no committed result shows it"
            assert geometric_mean(against) >= 1, f"{op}: {name} is slower than the reference"
