"""The notebook of predictions: nothing is left out of it, and it says what results say."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kit import predictions
from benchmarks.kit.discover import ROOT
from benchmarks.kit.predictions import NOT_RUN, PREDICTIONS, Prediction, floor_ms, page, render
from benchmarks.kit.summary import committed_results
from tests.benchmarks.fakes import measurement, result, timing

OP, IMPL = "gelu_tanh", "triton_impl"
CASE, WHAT = "720p-129f", "forward"


def on_gpu(arch: str = "sm_90", **changes):
    machine = replace(result().machine, device="NVIDIA H200", arch=arch, driver="580")
    shown = {"function": OP, "case": CASE, "dtype": "bfloat16", "what": WHAT, **changes}
    timings = [timing(IMPL, ms=1.25)]
    measured = measurement(timings=timings, best_peer=None, **shown)
    return {"a.json": result(op=OP, machine=machine, measurements=[measured])}


def line(text: str, words: str) -> list[str]:
    (found,) = (each for each in text.splitlines() if each.startswith("|") and words in each)
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_every_kernel_for_a_gpu_is_predicted():
    there = {
        (path.parent.name, path.stem)
        for impl in ("triton_impl", "cuda_impl")
        for path in ROOT.glob(f"kernels/*/{impl}.py")
    }
    assert {(p.op, p.impl) for p in PREDICTIONS} == there
    for p in PREDICTIONS:
        assert p.why and all(0 < share < 1.5 for share in p.of_floor.values())
    text = render({})
    for op, impl in there:
        assert f"| `{op}.{impl}` |" in text, "it has no case in the table"


def test_the_page_is_up_to_date():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    notes = (ROOT / predictions.PAGE).read_text()
    assert notes == page(notes, committed_results()), "run: python -m benchmarks --summary"


def test_a_floor_is_the_longer_of_copy_and_product():
    assert floor_ms(8 * 10**12, 0) == pytest.approx(2000)
    assert floor_ms(8 * 10**12, 780 * 10**13) == pytest.approx(10_000)


def test_a_line_counts_from_the_benchmarks_own_work():
    (case,) = (c for c in predictions.cases_on_hopper(OP) if (c.function, c.name) == (OP, CASE))
    cells = line(render({}), f"| {OP} {CASE}, {WHAT} |")
    expected = floor_ms(case.work[WHAT].num_bytes, 0)
    assert cells[-4:] == ["0.000", f"{expected:.2f}", f"{expected / 0.95:.2f}", NOT_RUN]


@pytest.mark.parametrize(
    ("results", "measured"),
    [
        ({}, NOT_RUN),
        (on_gpu(), "1.25 (0123456789)"),
        (on_gpu("sm_80"), NOT_RUN),
        (on_gpu(case="256p-65f"), NOT_RUN),
        (on_gpu(what="forward+backward"), NOT_RUN),
        (on_gpu(dtype="float16"), NOT_RUN),
        ({"cpu.json": result(op=OP)}, NOT_RUN),
    ],
)
def test_only_a_result_of_that_very_pass_on_hopper_is_a_measurement(results, measured):
    assert line(render(results), f"| {OP} {CASE}, {WHAT} |")[-1] == measured


def test_a_new_version_does_not_inherit_what_the_old_one_measured():
    name = f"{OP} {CASE}, {WHAT}"
    old = Prediction(OP, IMPL, {WHAT: 0.5}, "slow", then={name: "2.00 (fedcba9876)"})
    new = Prediction(OP, IMPL, {WHAT: 0.9}, "better", version=2)
    text = render(on_gpu(), [old, new])
    rows = [row for row in text.splitlines() if f"| {name} |" in row]
    assert [row.split("|")[-2].strip() for row in rows] == [
        *("2.00 (fedcba9876)", "1.25 (0123456789)")
    ]


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        page("# Notes\n", {})


def test_cases_are_described_without_a_gpu():
    for op in {p.op for p in PREDICTIONS}:
        assert predictions.cases_on_hopper(op)
    assert torch.empty(1).device.type == "cpu"
