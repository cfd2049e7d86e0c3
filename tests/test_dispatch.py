"""Who answers a call: order, reasons, names, verification, the notice about the native module."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import hunyuan_fast
from hunyuan_fast import dispatch, kernels

IMPLEMENTATION = '''"""{name}."""
VERIFIED_ON = frozenset({verified})
def example(device):
    import torch
    return (torch.zeros(2, device=device),)
def supports(x):
    return {reason!r} if {refuses} else None
def forward(x):
    return "{name}"
def backward(dx):
    return "{name}"
'''
CACHES = ("ops", "implementations", "_verified", "_candidates", "_native_missing")
CACHES += ("_say_what_is_missing",)


def clear_caches() -> None:
    for name in CACHES:
        getattr(dispatch, name).cache_clear()


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Builds the room of an op that exists for one test: room(op, reference={}, cpu_impl={...})."""
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(dispatch, "_named", {})

    def build(op: str, **implementations: dict[str, object]) -> str:
        folder = tmp_path / op
        folder.mkdir()
        (folder / "__init__.py").write_text('"""A room."""\n')
        for name, facts in implementations.items():
            facts = {"verified": "{'*'}", "reason": "", "refuses": "False"} | facts
            (folder / f"{name}.py").write_text(IMPLEMENTATION.format(name=name, **facts))
        importlib.invalidate_caches()
        clear_caches()
        return op

    yield build
    clear_caches()
    for name in [name for name in sys.modules if name.startswith("hunyuan_fast.kernels.made_")]:
        del sys.modules[name]


X = torch.ones(3)


def test_the_best_one_without_objection_answers(room):
    op = room("made_order", library_impl={}, reference={})
    assert dispatch.select(op, X).forward(X) == "library_impl"
    assert list(dispatch.implementations(op)) == ["library_impl", "reference"]


def test_an_objection_passes_the_call_on_and_is_told(room):
    refusal = {"reason": "x must have an even length", "refuses": "x.numel() % 2"}
    op = room("made_refusal", library_impl=refusal, reference={})
    assert dispatch.select(op, X).forward(X) == "reference"
    assert dispatch.explain(op, X) == {
        "library_impl": "x must have an even length",
        "reference": None,
    }
    assert dispatch.select(op, torch.ones(4)).forward(X) == "library_impl"


def test_an_unverified_one_answers_only_by_name(room):
    op = room("made_unverified", library_impl={"verified": "{'sm_90'}"}, reference={})
    assert dispatch.select(op, X).forward(X) == "reference"
    assert dispatch.explain(op, X)["library_impl"] == "unverified on cpu: no committed result"
    with dispatch.use("library_impl"):
        assert dispatch.select(op, X).forward(X) == "library_impl"
    assert dispatch.select(op, X).forward(X) == "reference"


@pytest.mark.parametrize("name", ["library_impl", "reference", "missing_impl"])
def test_one_that_knows_a_faster_one_leaves_the_call_to_it(name, room):
    refusal = {"reason": "x must be short", "refuses": "x.numel() > 6"}
    op = room("made_preference", cpu_impl={}, library_impl=refusal, reference={})
    module = dispatch.implementations(op)["cpu_impl"]
    module.prefers = lambda arch, x: name if arch == "cpu" and x.numel() > 3 else None
    assert dispatch.select(op, X).forward(X) == "cpu_impl"
    long, longer = torch.ones(5), torch.ones(7)
    chosen = name if name != "missing_impl" else "cpu_impl"
    assert dispatch.select(op, long).forward(long) == chosen
    found = dispatch.explain(op, long)
    assert next(each for each, reason in found.items() if reason is None) == chosen
    if chosen != "cpu_impl":
        assert found["cpu_impl"] == f"{chosen} is faster for this call"
    # what it prefers cannot take this one; and who is named answers whatever it prefers
    expected = "cpu_impl" if name != "reference" else "reference"
    assert dispatch.select(op, longer).forward(longer) == expected
    with dispatch.use("cpu_impl", op):
        assert dispatch.select(op, long).forward(long) == "cpu_impl"


def test_an_unverified_one_is_not_preferred(room):
    op = room("made_unproven", cpu_impl={}, library_impl={"verified": "{'sm_90'}"}, reference={})
    dispatch.implementations(op)["cpu_impl"].prefers = lambda arch, x: "library_impl"
    assert dispatch.select(op, X).forward(X) == "cpu_impl"
    assert dispatch.explain(op, X)["cpu_impl"] is None


def test_the_named_one_answers_or_raises_with_its_reason(room):
    refusal = {"reason": "x must be 2-d", "refuses": "x.ndim != 2"}
    op = room("made_named", library_impl=refusal, reference={})
    with dispatch.use("library_impl", op), pytest.raises(RuntimeError, match="x must be 2-d"):
        dispatch.select(op, X)
    with dispatch.use("reference"):
        assert dispatch.select(op, torch.ones(1, 1)).forward(X) == "reference"


def test_of_several_names_the_first_that_can_answers(room):
    refusal = {"reason": "x must be 2-d", "refuses": "x.ndim != 2"}
    op = room(
        "made_several", cpu_impl=refusal, library_impl={"verified": "{'sm_90'}"}, reference={}
    )
    for names in ("cpu_impl,library_impl", "triton_impl,cpu_impl,library_impl"):
        with dispatch.use(names):
            assert dispatch.select(op, X).forward(X) == "library_impl"
            assert dispatch.select(op, torch.ones(1, 1)).forward(X) == "cpu_impl"
    with dispatch.use("cpu_impl,triton_impl"), pytest.raises(RuntimeError, match="x must be 2-d"):
        dispatch.select(op, X)
    with pytest.raises(ValueError, match="has no 'triton_impl'"):
        dispatch.use("cpu_impl,triton_impl", op).__enter__()


def test_a_name_for_one_op_leaves_the_others_alone(room):
    one = room("made_one", library_impl={}, reference={})
    two = room("made_two", library_impl={}, reference={})
    with dispatch.use("reference", one):
        assert dispatch.select(one, X).forward(X) == "reference"
        assert dispatch.select(two, X).forward(X) == "library_impl"
        with dispatch.use("library_impl", one):
            assert dispatch.select(one, X).forward(X) == "library_impl"
        assert dispatch.select(one, X).forward(X) == "reference"
    assert dispatch.select(one, X).forward(X) == "library_impl"


def test_a_name_for_all_ops_passes_by_rooms_that_never_had_it(room):
    op = room("made_without", reference={})
    with dispatch.use("triton_impl"):
        assert dispatch.select(op, X).forward(X) == "reference"
    with (
        pytest.raises(ValueError, match=r"has no 'triton_impl'; it has reference"),
        dispatch.use("triton_impl", op),
    ):
        pytest.fail("the block must not be entered")


def test_a_name_for_all_ops_verifies_nothing_in_rooms_without_it(room):
    op = room("made_without_verified", library_impl={"verified": "{'sm_90'}"}, reference={})
    with dispatch.use("triton_impl"):
        assert dispatch.select(op, X).forward(X) == "reference"


def test_a_name_for_all_ops_overrules_no_objection_in_rooms_without_it(room):
    op = room("made_without_answer", reference={"reason": "not today", "refuses": "True"})
    with (
        dispatch.use("triton_impl"),
        pytest.raises(RuntimeError, match=r"answers this call.*not today"),
    ):
        dispatch.select(op, X)


@pytest.mark.parametrize("name", ["", "cuda", "Reference", "reference "])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="implementation must be one of"), dispatch.use(name):
        pytest.fail("the block must not be entered")


def test_the_name_is_forgotten_after_an_error(room):
    op = room("made_error", library_impl={}, reference={})
    with pytest.raises(KeyError), dispatch.use("reference"):
        raise KeyError
    assert dispatch.select(op, X).forward(X) == "library_impl"


def test_the_name_holds_in_other_threads(room):
    """Autograd runs the backward of a GPU op in a thread of its own."""
    op = room("made_thread", library_impl={}, reference={})
    seen = []
    with dispatch.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.select(op, X).forward(X)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_op_is_refused_by_name():
    with pytest.raises(ValueError, match=r"op must be one of .*rope3d_attention.*, got 'nonsense'"):
        dispatch.select("nonsense", X)


def test_a_call_without_a_tensor_is_refused(room):
    with pytest.raises(TypeError, match="at least one tensor"):
        dispatch.select(room("made_no_tensor", reference={}), 3.0)


def test_when_nobody_answers_every_reason_is_given(room):
    op = room("made_nobody", reference={"reason": "not today", "refuses": "True"})
    with pytest.raises(RuntimeError, match=r"made_nobody answers this call.*not today"):
        dispatch.select(op, X)


def test_the_lack_of_the_native_module_is_a_reason_and_said_once(room, monkeypatch, caplog):
    op = room("made_native", cuda_impl={}, cpu_impl={}, reference={})
    other = room("made_native_too", cpu_impl={}, reference={})
    monkeypatch.setitem(sys.modules, "hunyuan_fast._C", None)  # importing it raises ImportError
    clear_caches()
    with caplog.at_level(logging.WARNING, logger="hunyuan_fast"):
        for name in (op, other, op):
            assert dispatch.select(name, X).forward(X) == "reference"
    assert len(caplog.records) == 1
    assert "hunyuan_fast._C" in caplog.text
    assert "hunyuan_fast._C" in dispatch.explain(op, X)["cpu_impl"]
    with dispatch.use("cpu_impl"), pytest.raises(RuntimeError, match=r"cpu_impl was asked for"):
        dispatch.select(op, X)


def test_triton_needs_a_gpu_or_its_interpreter(room, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op = room("made_triton", triton_impl={}, reference={})
    assert "finds no GPU" in dispatch.explain(op, X)["triton_impl"]
    assert dispatch.select(op, X).forward(X) == "reference"


def test_the_report_names_every_op_its_answer_and_the_reasons(room):
    refusal = {"reason": "x is too short", "refuses": "True"}
    op = room("made_report", library_impl=refusal, reference={})
    report = hunyuan_fast.report()
    assert report.answering(op, "cpu") == "reference"
    assert {op for op, _ in report.reasons} == set(dispatch.ops())
    row = next(line for line in str(report).splitlines() if line.startswith(op))
    assert row.split()[:3] == [op, "cpu", "reference"]
    assert "library_impl: x is too short" in row


def test_every_real_op_answers_on_the_cpu():
    for op in dispatch.ops():
        assert hunyuan_fast.report().answering(op, "cpu") in dispatch.implementations(op)


def test_choosing_is_quick(room):
    """It happens inside every op. The bound is fifty times what it takes on a quiet machine."""
    refusal = {"reason": "no", "refuses": "True"}
    op = room("made_quick", library_impl=refusal, reference={})
    dispatch.select(op, X)
    start = time.perf_counter()
    for _ in range(1000):
        dispatch.select(op, X)
    assert (time.perf_counter() - start) / 1000 < 100e-6


@pytest.mark.parametrize(
    ("value", "outcome"),
    [("reference", "kernels.rope3d_attention.reference"), ("fastest", "got 'fastest'")],
)
def test_the_environment_names_one(value, outcome):
    code = (
        "import torch; from hunyuan_fast.dispatch import select\n"
        "q = torch.zeros(1, 2, 1, 8)\n"
        "print(select('rope3d_attention', q, q, q, None, 1.0).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HUNYUAN_FAST_IMPL": value},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert outcome in result.stdout + result.stderr
