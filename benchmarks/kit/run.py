"""All cases of an op on one device."""

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.kit import machine
from benchmarks.kit.alternate import alternate
from benchmarks.kit.case import PASSES, Case
from benchmarks.kit.clock import clock_for
from benchmarks.kit.discover import load
from benchmarks.kit.measure import Setting, measure
from benchmarks.kit.pairing import Rounds
from benchmarks.kit.record import VERSION, Result

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
) -> Result:
    """Measure every case of an op in every pass; ``tests`` and ``command`` go into the result."""
    # Helpers that outlive a compilation would pass for neighbours, and may take a core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    clock = clock_for(device, machine.cache_bytes())
    setting = Setting(device, clock, QUICK if quick else THOROUGH)
    source = machine.describe_source(op, command)
    neighbours = machine.Neighbours()
    clock.warm_up()

    measurements, alternations = [], []
    for case in load(op).cases(device, quick=quick):
        for what in (each for each in PASSES if each in case.work):
            progress(f"{op}: {case.function} {case.name} {case.dtype_name}, {what}")
            measurements.append(measure(op, case, what, _setting_for(case, setting)))
        if case.alternating and device.type == "cpu":
            alternations += alternate(op, case, setting)
    return Result(
        version=VERSION,
        op=op,
        quick=quick,
        tests=tests,
        neighbours=neighbours.share(),
        machine=machine.describe_machine(device),
        source=source,
        measurements=measurements,
        alternations=alternations,
    )


def _setting_for(case: Case, setting: Setting) -> Setting:
    return setting if case.rounds is None else replace(setting, rounds=case.rounds)
