"""Measure the candidates of an op, and write down who is right and fastest.

Every candidate first has to agree with the reference, on small calls full of edges and on the one
that is timed. Those who do are timed in turn, round by round, so that what slows the machine slows
everybody. Problems are the room's own (``kernels/<op>/problems.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from statistics import median
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from hunyuan_fast import dispatch, ranking

# Progress as pipelines report it: stage, step, number of steps.
Progress = Callable[[str, int, int], object]

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50
# Calls of one candidate in a round take at least this together, on a CPU.
_LEAST_SAMPLE = 0.002
# Written over before every call on a GPU: more than any second-level cache holds.
_FLUSH_BYTES = 256 * 2**20


class Problem(Protocol):
    """A call to measure; ``kernels/rope3d_attention/problems.py`` has the first of the kind."""

    @property
    def shape_class(self) -> ranking.ShapeClass:
        """The class that the measurement is of."""

    @property
    def flops(self) -> int:
        """Of its matrix products."""

    @property
    def trials(self) -> Sequence[Any]:
        """Small problems on which every candidate must agree first."""

    def worth_timing(self, name: str, device: torch.device) -> bool:
        """Whether a candidate could win."""

    def draw(self, device: torch.device) -> Any:
        """Inputs, of which ``arguments`` are those of the op's implementations."""

    def run(self, impl: ModuleType, inputs: Any) -> list[Tensor]:
        """Results of one implementation."""

    def truth(self, inputs: Any) -> list[Tensor]:
        """What results are compared with."""

    def error(self, results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        """Distance from the truth: up to 1 agrees."""


def measure(
    op: str,
    problem: Problem,
    device: torch.device,
    *,
    seconds: float,
    without: Sequence[str] = (),
    progress: Progress = lambda *_: None,
) -> ranking.Entry:
    """Judge and time all candidates of ``op`` for one problem.

    seconds: how long to time them, in all
    without: candidates to leave out
    Raises RuntimeError when a candidate has broken the device: nothing can be measured after it.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device:  # events are those of the current device
        return _measure(op, problem, device, seconds, without, progress)


def _measure(
    op: str,
    problem: Problem,
    device: torch.device,
    seconds: float,
    without: Sequence[str],
    progress: Progress,
) -> ranking.Entry:
    name = str(problem)
    found = dispatch.choices(op)
    inputs = problem.draw(device)
    truth = problem.truth(inputs)
    error: dict[str, float] = {}
    declined: dict[str, str] = {}
    first: dict[str, float] = {}
    for step, (candidate, impl) in enumerate(found.items()):
        progress(name, step, len(found) + 1)
        reason = _unfit(candidate, impl, problem, inputs, device, without)
        if reason is None:
            reason = _judge(candidate, impl, problem, inputs, truth, error, first)
        if reason is not None:
            declined[candidate] = reason
        _check_device(device, candidate)
    progress(name, len(found), len(found) + 1)
    runs = {each: _call(problem, found[each], inputs) for each in first}
    ms = {each: 1e3 * taken for each, taken in _times(runs, first, device, seconds).items()}
    progress(name, len(found) + 1, len(found) + 1)
    return ranking.Entry(problem.shape_class, name, ms, error, declined)


def keep(op: str, arch: str, device: torch.device, entries: list[ranking.Entry]) -> None:
    """Put what was measured into the user's file, where it decides from now on. Raises OSError."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    section = ranking.Section(
        op, arch, ranking.device_name(device), ranking.software(op), now, entries
    )
    path = ranking.user_file()
    try:
        before = ranking.load(path)
    except ranking.RankingError:  # whoever calls a broken file to mind has been told already
        before = []
    ranking.save(ranking.merged(section, before), path)
    dispatch.forget_rankings()


def _unfit(
    name: str,
    impl: ModuleType,
    problem: Problem,
    inputs: Any,
    device: torch.device,
    without: Sequence[str],
) -> str | None:
    if name in without:
        return "left out"
    if name == "triton_impl" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter (TRITON_INTERPRET=1) is for tests, not for timing"
    if not problem.worth_timing(name, device):
        return "too slow for this length"
    reason: str | None = impl.supports(*inputs.arguments)
    return reason


def _judge(
    name: str,
    impl: ModuleType,
    problem: Problem,
    inputs: Any,
    truth: list[Tensor],
    error: dict[str, float],
    first: dict[str, float],
) -> str | None:
    """Why a candidate is not to be timed, if so; else fills in its error and its first time."""
    worst = 0.0
    try:
        for small in problem.trials:
            drawn = small.draw(inputs.arguments[0].device)
            if impl.supports(*drawn.arguments) is None:
                worst = max(worst, small.error(small.run(impl, drawn), small.truth(drawn)))
        if worst <= 1:
            call = _call(problem, impl, inputs)
            worst = max(worst, problem.error(call(), truth))
            # The second call: in the first one kernels are compiled and plans made.
            start = time.perf_counter()
            call()
            _wait(inputs.arguments[0].device)
            first[name] = time.perf_counter() - start
    except Exception as failure:  # libraries may raise anything, and the others go on
        first.pop(name, None)
        return f"{type(failure).__name__}: {_first_line(failure)}"[:200]
    error[name] = worst
    if worst > 1:
        first.pop(name, None)
        return f"disagrees with the reference: {worst:.3g} times what rounding may cause"
    return None


def _call(problem: Problem, impl: ModuleType, inputs: Any) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return problem.run(impl, inputs)

    return call


def _times(
    runs: Mapping[str, Callable[[], object]],
    first: dict[str, float],
    device: torch.device,
    seconds: float,
) -> dict[str, float]:
    """Median seconds of each call; of one that would use up the time alone, those of one call."""
    least = min(first.values(), default=0.0)
    slow = {n for n in runs if first[n] > 3 * least and first[n] * _LEAST_ROUNDS > seconds / 2}
    samples = {name: [first[name]] if name in slow else [] for name in runs}
    order = [name for name in runs if name not in slow]
    flush = None
    if device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    start = time.perf_counter()
    for done in range(_MOST_ROUNDS if order else 0):
        if done >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in order:
            if flush is not None:
                samples[name].append(_sample_cuda(runs[name], flush))
            else:
                calls = max(1, int(_LEAST_SAMPLE / max(first[name], 1e-7)))
                samples[name].append(_sample_cpu(runs[name], calls))
        order.append(order.pop(0))
    return {name: median(taken) for name, taken in samples.items()}


def _sample_cpu(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _sample_cuda(run: Callable[[], object], flush: Tensor) -> float:
    """Seconds between two events; overwriting the cache gives the host time to queue the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_device(device: torch.device, candidate: str) -> None:
    try:
        _wait(device)
    except RuntimeError as error:
        said = _first_line(error)
        raise RuntimeError(
            f"{candidate} has broken {device} ({said}); measure again with --without {candidate}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
