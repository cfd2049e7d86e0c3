"""From results of a device to the kernels that answer there without being named.

An op without a ranking is answered by the first, in the order of dispatch, of those whose
``VERIFIED_ON`` names the architecture. A result that has its op's tests behind it may add that. It
times nobody who computes something else; whoever it timed and was, over all cases, not slower than
any that comes later in the order gets the architecture.
"""

from collections.abc import Sequence
from math import exp, log
from pathlib import Path

from benchmarks.kit.contenders import OURS, REFERENCE
from benchmarks.kit.discover import ROOT
from benchmarks.kit.rankings import verify
from benchmarks.kit.record import Measurement, Result
from hunyuan_fast import ranking
from hunyuan_fast.dispatch import IMPLEMENTATIONS


def commit(results: Sequence[Result], root: Path = ROOT) -> list[str]:
    """Write architectures into the ``VERIFIED_ON`` of rooms; returns what was done and found.

    results: those at hand. What is no evidence, of no room or of a ranked op says nothing.
    """
    said = []
    for result in results:
        room = root / "kernels" / result.op
        evidence = result.tests == "passed" and not result.quick and result.source.clean
        if not evidence or not room.is_dir() or ranking.is_ranked(result.op):
            continue
        where = f"{result.op} on {result.machine.arch}"
        order = _timed(result)
        for name in (each for each in order if each != REFERENCE):
            if slower := _slower_than(result, name, order):
                said.append(f"{where}: {name} is not verified, {slower}")
            elif verify(_source_of(room, name), result.machine.arch):
                said.append(f"{where}: {name} is verified")
            said.extend(f"{where}: {lost}" for lost in _lost(result, name, order))
    return said


def _timed(result: Result) -> list[str]:
    """Ours, in the order in which dispatch asks them."""
    names = {t.name for m in result.measurements for t in m.timings if t.kind == OURS}
    return sorted(names, key=lambda name: (IMPLEMENTATIONS.index(name.partition(".")[0]), name))


def _slower_than(result: Result, name: str, order: Sequence[str]) -> str:
    """Who comes later and is faster over all cases that both take; empty where nobody is."""
    for other in order[order.index(name) + 1 :]:
        ratios = [ratio for m in result.measurements if (ratio := _ratio(m, name, other))]
        if ratios and (times := exp(sum(map(log, ratios)) / len(ratios))) > 1:
            return f"{other} is {times:.2f} times as fast over {len(ratios)} measurements"
    return ""


def _lost(result: Result, name: str, order: Sequence[str]) -> list[str]:
    """Single cases that somebody later wins by more than a tenth: what ``prefers`` is for."""
    found = []
    for other in order[order.index(name) + 1 :]:
        for m in result.measurements:
            if (ratio := _ratio(m, name, other)) and ratio > 1.1:
                case = f"{m.function} {m.case} {m.dtype} {m.what}"
                found.append(f"{other} is {ratio:.2f} times as fast as {name} at {case}")
    return found


def _ratio(m: Measurement, name: str, other: str) -> float | None:
    """Time of one over that of the other; None where a measurement lacks one of them."""
    ms = {t.name: t.ms.median for t in m.timings if t.kind == OURS}
    return ms[name] / ms[other] if name in ms and other in ms else None


def _source_of(room: Path, name: str) -> Path:
    first, _, library = name.partition(".")
    return room / "libraries" / f"{library}.py" if library else room / f"{first}.py"
