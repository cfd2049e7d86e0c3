"""``pytest --rehearse-gpu``: what is marked ``gpu``, and nothing else, on the pretended device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch

from benchmarks.kit.pairing import Rounds
from tests.kit import gpu
from tests.kit.rehearsal import kernels, runtime, tensors
from tests.kit.rehearsal.device import Device, State, is_on_device

ROUNDS = Rounds(budget=1e6, least=1, most=1)  # of a benchmark; nobody is too slow for it


@cache
def begin() -> None:
    """From here on this process pretends to have a device. There is no way back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("torch.distributed.optim")  # scripts itself, by functions as they are
    gpu.rehearsed = True
    for module in (tensors, runtime):
        module.install(setattr)
    kernels.install()
    _watch_backward()
    _make_small()
    # calls of ops go to kernels as they do where no mode is active
    from hunyuan_fast.ops import operator

    operator._dispatch_modes = lambda: 0


def _make_small() -> None:
    """What is written over, multiplied or repeated only so that a GPU can be timed."""
    from benchmarks.kit import clock, floor, run
    from hunyuan_fast import tuning

    clock._WARM_UP = floor._MATMUL_SIZE["cuda"] = 64
    tuning._FLUSH_BYTES, tuning._MOST_ROUNDS = 2**12, 3
    run.QUICK = run.THOROUGH = ROUNDS


def _watch_backward() -> None:
    run = torch.autograd._engine_run_backward

    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        before, State.backward = State.backward, any(is_on_device(x) for x in outputs)
        try:
            return run(outputs, *args, **kwargs)
        finally:
            State.backward = before

    torch.autograd._engine_run_backward = run_backward


class Plugin:
    """Hooks of pytest. most: how many cases of a test to run; 0: all."""

    def __init__(self, most: int = 0) -> None:
        self._most = most

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        with Device():
            return (yield)

    @pytest.hookimpl(trylast=True)  # of what -k has left
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        tests: dict[str, list[pytest.Item]] = {}
        for item in items:
            if item.get_closest_marker("gpu"):
                tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
        chosen = [item for cases in tests.values() for item in self._some(cases)]
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen

    def _some(self, cases: list[pytest.Item]) -> list[pytest.Item]:
        """Spread over all; neighbours differ in few parameters."""
        if not self._most or len(cases) <= self._most:
            return cases
        if self._most == 1:
            return cases[-1:]
        last = len(cases) - 1
        return [cases[i * last // (self._most - 1)] for i in range(self._most)]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("REHEARSAL: the GPU was pretended, and nothing is verified")
