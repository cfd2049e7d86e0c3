"""All cases of an op on one device."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from benchmarks.kit import machine
from benchmarks.kit.alternate import alternate
from benchmarks.kit.case import EVERY_PASS, Case
from benchmarks.kit.clock import clock_for
from benchmarks.kit.discover import load
from benchmarks.kit.measure import Setting, measure
from benchmarks.kit.pairing import Rounds
from benchmarks.kit.record import VERSION, Key, Result

# A median of five is the least that shrugs off two disturbed rounds.
THOROUGH = Rounds(budget=15.0, least=5, most=40)
QUICK = Rounds(budget=1.0, least=3, most=10)


def run(
    op: str,
    device: torch.device,
    *,
    quick: bool,
    tests: str,
    command: str,
    progress: Callable[[str], None],
    only: str = "",
    known: Collection[Key] = (),
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measure every case of an op in every pass; ``tests`` and ``command`` go into the result.

    only: a text, and cases without it in their function, name and dtype stay out. Raises ValueError
    when that leaves none.
    known: passes of cases that are not measured again
    keep: gets the result as far as it is after every pass of a case
    """
    # Helpers that outlive a compilation would pass for neighbours, and may take a core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    clock = clock_for(device, machine.cache_bytes())
    setting = Setting(device, clock, QUICK if quick else THOROUGH)
    source = machine.describe_source(op, command)
    neighbours = machine.Neighbours()
    clock.warm_up()

    result = Result(
        version=VERSION,
        op=op,
        quick=quick,
        tests=tests,
        neighbours=None,
        machine=machine.describe_machine(device),
        source=source,
        measurements=[],
        alternations=[],
    )
    for case in _chosen(load(op).cases(device, quick=quick), only):
        name = case.function, case.name, case.dtype_name
        for what in (each for each in EVERY_PASS if each in case.work):
            if (*name, what) in known:
                continue
            progress(f"{op}: {' '.join(name)}, {what}")
            result.measurements.append(measure(op, case, what, _setting_for(case, setting)))
            keep(replace(result, neighbours=neighbours.share()))
        if case.alternating and device.type == "cpu":
            result.alternations.extend(alternate(op, case, setting))
    return replace(result, neighbours=neighbours.share())


def _chosen(cases: Sequence[Case], only: str) -> list[Case]:
    names = [f"{case.function} {case.name} {case.dtype_name}" for case in cases]
    found = [case for case, name in zip(cases, names, strict=True) if only in name]
    if not found:
        raise ValueError(f"--only: no case holds {only!r}; there are {'; '.join(names)}")
    return found


def _setting_for(case: Case, setting: Setting) -> Setting:
    return setting if case.rounds is None else replace(setting, rounds=case.rounds)
