"""The table of agreement shows who is wrong, and in which result."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import agreement
from hunyuan_fast import dispatch
from hunyuan_fast.kernels.rope3d_attention import reference
from hunyuan_fast.kernels.rope3d_attention.problems import Problem

CPU = torch.device("cpu")
SMALL = [Problem(torch.float32, 2, 40, 2, 8, lengths, True) for lengths in (None, (0, 33))]


@pytest.fixture
def candidates(monkeypatch):
    def backward(*args):
        dq, dk, dv = reference.backward(*args)
        return dq, 1.01 * dk, dv

    wrong = SimpleNamespace(
        supports=reference.supports, forward=reference.forward, backward=backward
    )
    absent = SimpleNamespace(supports=lambda *_: "it is not installed")
    found = {"wrong": wrong, "reference": reference, "absent": absent}
    monkeypatch.setattr(dispatch, "choices", lambda op: found)
    monkeypatch.setattr(agreement, "problems", lambda dtype: SMALL)


def test_distances_tell_what_is_wrong(candidates):
    found = agreement.alone(torch.float32, CPU)
    assert found["absent"] == "it is not installed"
    assert found["wrong"][3] == pytest.approx(0.01, rel=1e-3)
    assert max(found["wrong"][i] for i in (0, 1, 2, 4)) < 1e-5
    assert max(found["reference"]) < 1e-5


def test_no_number_in_one_problem_is_none_in_the_table(candidates, monkeypatch):
    def backward(dout, *args):
        """NaN where there are lengths, which the first problem has not."""
        dq, dk, dv = reference.backward(dout, *args)
        return dq, dk * (1 if args[5] is None else torch.nan), dv

    monkeypatch.setattr(dispatch.choices("any")["wrong"], "backward", backward)
    found = agreement.alone(torch.float32, CPU)
    assert [math.isnan(x) for x in found["wrong"]] == [False, False, False, True, False]


def test_mixing_tells_whose_backward_it_is(candidates):
    found = agreement.mixed(["wrong", "reference"], torch.float32, CPU)
    assert all((error > 1) == (second == "wrong") for (_, second), error in found.items())


def test_the_tables_are_printed(candidates, capsys):
    assert agreement.main(["--dtype", "float32", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "| wrong |" in shown and "- absent: it is not installed" in shown


def test_texts_of_every_length_are_among_the_problems():
    found = agreement.problems(torch.bfloat16)
    assert {p.head_dim for p in found} == {64, 80, 96, 128, 256}
    lengths = {n for p in found for n in p.lengths or ()}
    assert {0, 1, agreement._VIDEO, agreement._VIDEO + 1, agreement._VIDEO + 64} <= lengths
    assert all(p.length % 16 for p in found)
