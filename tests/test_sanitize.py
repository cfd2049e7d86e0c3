"""The cases for compute-sanitizer: none is missing, each is right, and a wrong result is seen."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.importorskip("triton")
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")

from tests import sanitize
from tests.kit import hopper
from tests.sanitize_cases import stands
from tests.sanitize_cases.case import compare

ROOT = Path(__file__).parents[1]
GPU = ("triton_impl", "cuda_impl")
IMPLEMENTATIONS = sorted(
    (path.parent.name, path.stem) for impl in GPU for path in ROOT.glob(f"kernels/*/{impl}.py")
)
# What they have beside the parts that launch kernels by themselves.
NO_PARTS = ("supports", "supports_raw", "prefers")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@pytest.mark.parametrize(("room", "impl"), IMPLEMENTATIONS, ids=lambda name: name)
def test_every_part_of_every_implementation_has_a_case(room: str, impl: str) -> None:
    module = import_module(f"hunyuan_fast.kernels.{room}.{impl}")
    parts = {
        name
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and name.startswith(("forward", "backward"))
    }
    assert "forward" in parts
    having = {c.part for c in sanitize.CASES.values() if (c.room, c.impl) == (room, impl)}
    assert parts <= having, (
        f"give {room}/{impl} a case for {parts - having} in tests/sanitize_cases"
    )


@without_gpu
@pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")
def test_the_cases_are_right_and_reach_every_kernel(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    launched: set[str] = set()
    run = InterpretedFunction.run

    def noted(self: InterpretedFunction, *args: object, **options: object) -> object:
        launched.add(f"{self.fn.__module__.split('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    ran = [c for c in sanitize.CASES.values() if not c.slow and c.missing() is None]
    for case in ran:
        case.run()
    assert triton_kernels() == launched
    assert native_functions("_hopper") <= stands.called


def test_cases_that_need_a_gpu_are_those_of_what_is_not_emulated() -> None:
    bare = {case.name for case in sanitize.CASES.values() if case.here is None}
    assert {"/".join(name.split("/")[:2]) for name in bare} == {
        *("fused_modulation/cuda_impl", "causal_conv3d/cuda_impl")
    }
    assert native_functions("_cuda") == {
        *("fused_modulation_forward_cuda", "fused_modulation_backward_cuda")
    }


def test_what_is_slow_is_not_the_only_one() -> None:
    cases = sanitize.CASES.values()
    fast = {(case.room, case.impl, case.part) for case in cases if not case.slow}
    assert {(case.room, case.impl, case.part) for case in cases} == fast
    assert len(sanitize.CASES) == len(
        [*sanitize.rows.CASES, *sanitize.convolution.CASES, *sanitize.attention.CASES]
    ), "two cases have one name"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.tensor([1.0, 2.0, 3.1]), "error 0.0577 at a size of 2.16"),
        (torch.tensor([1.0, 2.0, torch.nan]), "infinite or NaN elsewhere"),
        (None, "is None, not tensor"),
        ((torch.ones(3),) * 2, "2 results, not 1"),
    ],
)
def test_a_wrong_result_is_seen(result: object, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        compare(result, torch.tensor([1.0, 2.0, 3.0]), 0.02, "case")


def test_right_results_are_let_through() -> None:
    truth = torch.tensor([1.0, -torch.inf, 3.0], dtype=torch.float64)
    compare((truth.bfloat16(), None), (truth, None), 0.02, "case")
    compare(torch.zeros(0), torch.zeros(0), 0.02, "case")


@without_gpu
def test_a_run_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from hunyuan_fast.kernels.gelu_tanh import triton_impl

    monkeypatch.setattr(triton_impl, "forward", lambda x, left=None: x.relu())
    assert sanitize.main(["gelu_tanh/triton_impl/forward", "fused_modulation/cuda_impl"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG gelu_tanh/triton_impl/forward: result 0: error" in shown
    assert "fused_modulation/cuda_impl/forward, narrow: needs a GPU" in shown
    assert "1 cases, 1 wrong" in shown


def test_the_command_lists_its_cases_and_refuses_others() -> None:
    command = [sys.executable, "-m", "tests.sanitize"]
    done = subprocess.run(
        [*command, "--list", "ring_attention"], cwd=ROOT, capture_output=True, text=True
    )
    lines = [name for name in sanitize.CASES if name.startswith("ring_attention/")]
    assert [line.split("  (")[0] for line in done.stdout.splitlines()] == lines
    with pytest.raises(SystemExit) as leaving:
        sanitize.main(["ring"])
    assert leaving.value.code == 2


def triton_kernels() -> set[str]:
    """Room and name of every kernel that is launched, by their sources."""
    return {
        f"{path.parent.name}.{node.name}"
        for path in ROOT.glob("kernels/*/*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")
        if any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    }


def native_functions(suffix: str) -> set[str]:
    """Functions of the native module that end so, by their sources."""
    text = "".join(path.read_text() for path in ROOT.glob("csrc/*/*.cpp"))
    return set(re.findall(rf'm\.def\("(\w+{suffix})"', text))
