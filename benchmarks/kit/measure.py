"""One pass of a case, from inputs to figures."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit import resident
from benchmarks.kit.case import FORWARD, Case, Weighted
from benchmarks.kit.clock import MIB, Clock
from benchmarks.kit.contenders import OURS, PEER, REFERENCE, Contender, contenders, first_line
from benchmarks.kit.floor import CONV3D, COPY, MATMUL, floor_probes, floors
from benchmarks.kit.pairing import Entry, Rounds, Samples, paired_samples
from benchmarks.kit.record import Measurement, Timing
from benchmarks.kit.running import Bound, Inputs, alike, context_of
from benchmarks.kit.statistics import Spread, paired_ratio, spread

# Contenders compute the same thing. This sees a different formula; how exact ours are is for the
# tests to say.
_PROBED = 20  # calls of a probe in a sample, beside contenders that are called once
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure. told: takes figures of long calls as soon as there are any."""

    device: torch.device
    clock: Clock
    rounds: Rounds
    seed: int = 0
    told: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Trial:
    """What the first calls showed: distance from the reference, seconds of a warm call.

    peak_bytes: where it was asked for, the peak of memory during the first one
    cosine: to the reference, where a result is another one by design
    """

    difference: float
    seconds: float
    peak_bytes: int | None = None
    cosine: float | None = None


def measure(op: str, case: Case, what: str, setting: Setting) -> Measurement:
    """Time everyone who can take part in one pass of a case, beside the floor of the machine.

    Raises RuntimeError when one of ours does not compute what the reference does, or what the first
    of ours does where there is no reference, and when none of ours is left.
    """
    inputs = Inputs(case, setting.device, setting.clock, setting.seed)
    found, declined = contenders(op, case, inputs.sets[0])
    runs = {c.name: Bound(c.call, what, inputs) for c in found}
    entries = {c.name: Entry(runs[c.name], context_of(c, what)) for c in found}
    trials = _try_out(op, case, what, setting, found, entries, declined)
    left = [trials[c.name].seconds for c in found if c.kind == OURS and c.name in trials]
    if not left:
        raise RuntimeError(f"{op}: none of ours can do {case.name} {what}: {declined}")
    _leave_out_slow(trials, min(left), setting.rounds, declined)

    ready = [c for c in found if c.name in trials]
    peaks = {c.name: _peak_mib(entries[c.name], setting.clock, trials[c.name]) for c in ready}
    kept = {c.name: _kept_mib(c, what, runs[c.name]) for c in ready}
    work = case.work[what]
    probes = floor_probes(case, work, setting.device, len(inputs.sets))
    everything = {c.name: entries[c.name] for c in ready}
    if case.rounds is not None:
        everything = {
            name: replace(entry, seconds=trials[name].seconds) for name, entry in everything.items()
        }
    # Where a contender is sampled once or twice, the floor is no single short call either.
    calls = _PROBED if case.once else 1
    everything |= {name: replace(probe.entry, calls=calls) for name, probe in probes.items()}
    samples = paired_samples(everything, setting.clock, setting.rounds)
    floor, bound = floors(probes, samples.seconds, work)
    rates = {name: p.amount / spread(samples.seconds[name]).median for name, p in probes.items()}
    return Measurement(
        case=case.name,
        function=case.function,
        dtype=case.dtype_name,
        shape=case.shape,
        what=what,
        num_bytes=work.num_bytes,
        num_flops=work.num_flops,
        copy_gb_per_s=rates[COPY] / 1e9,
        matmul_tflop_per_s=rates[MATMUL] / 1e12 if MATMUL in rates else None,
        conv3d_tflop_per_s=rates[CONV3D] / 1e12 if CONV3D in rates else None,
        plain_flops=case.plain_flops,
        floor_ms=_times(spread(floor), 1e3),
        bound=bound,
        best_peer=best_peer(ready, samples),
        timings=timings(ready, trials, peaks, kept, samples, floor),
        declined=declined,
    )


def timings(
    ready: Sequence[Contender],
    trials: dict[str, Trial],
    peaks: dict[str, float | None],
    kept: dict[str, float | None],
    samples: Samples,
    floor: Sequence[float],
) -> list[Timing]:
    """Everyone's time, and within each round its ratio to the best peer and to the floor."""
    seconds = samples.seconds
    best = best_peer(ready, samples)
    return [
        Timing(
            name=c.name,
            kind=c.kind,
            answers=c.answers,
            ms=_times(spread(seconds[c.name]), 1e3),
            rounds=len(seconds[c.name]),
            calls=samples.calls[c.name],
            speedup=paired_ratio(seconds[best], seconds[c.name]) if best else None,
            of_floor=paired_ratio(floor, seconds[c.name]),
            peak_mib=peaks[c.name],
            kept_mib=kept[c.name],
            difference=trials[c.name].difference,
            cosine=trials[c.name].cosine,
        )
        for c in ready
    ]


def best_peer(ready: Sequence[Contender], samples: Samples) -> str | None:
    """The peer with the lowest median; None when there is none."""
    peers = [c.name for c in ready if c.kind == PEER]
    medians = {name: spread(samples.seconds[name]).median for name in peers}
    return min(medians, key=medians.__getitem__, default=None)


def relative_difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square of the differences over that of ``expected``, of the worst tensor."""
    worst = torch.zeros(())
    for result, truth in zip(results, expected, strict=True):
        difference = (result.float() - truth.float()).square().mean().sqrt()
        scale = truth.float().square().mean().sqrt()
        relative = torch.where(scale > 0, difference / scale, difference)
        worst = torch.maximum(worst, relative.cpu())  # NaN stays NaN
    return float(worst)


def least_cosine(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Cosine of the angle between a result and ``expected``, of the worst tensor; NaN for zeros."""

    def dot(a: Tensor, b: Tensor) -> float:
        return float((a.float() * b.float()).sum(dtype=torch.float64))

    cosines = []
    for result, truth in zip(results, expected, strict=True):
        lengths = dot(result, result) * dot(truth, truth)
        cosines.append(dot(result, truth) / lengths**0.5 if lengths > 0 else math.nan)
    return min(cosines)


def _try_out(
    op: str,
    case: Case,
    what: str,
    setting: Setting,
    found: Sequence[Contender],
    entries: dict[str, Entry],
    declined: dict[str, str],
) -> dict[str, Trial]:
    """Warm everyone up and let only those pass who compute the same."""
    trials: dict[str, Trial] = {}
    expected: list[Tensor] | None = None
    start = time.monotonic()
    # The reference goes first, because the others are compared with it.
    for c in sorted(found, key=lambda c: c.name != REFERENCE):
        spent = time.monotonic() - start
        if case.once and _is_late(trials, spent, setting.rounds):
            declined[c.name] = f"no time is left for it, after {spent:.0f} s"
            continue
        try:
            result, trial = _try_one(case, what, setting, c, entries[c.name], expected)
        except Exception as failure:
            # Peers and compilers may raise anything, and the others can still be measured.
            if not c.may_fail:
                raise
            declined[c.name] = first_line(failure)
            continue
        expected = result if expected is None else expected
        if c.same and not trial.difference <= _TOLERANCE[case.dtype]:
            told = f"relative difference from the reference {trial.difference:.2g}"
            if c.kind == OURS:
                raise RuntimeError(f"{op}: {c.name} is wrong in {case.name} {what}: {told}")
            declined[c.name] = f"computes something else: {told}"
        else:
            trials[c.name] = trial
            if case.once:
                setting.told(f"{c.name}: {trial.seconds:.2f} s at first")
    return trials


def _is_late(trials: dict[str, Trial], spent: float, rounds: Rounds) -> bool:
    """Whether a round of those who were called, and another two calls, would exceed the budget."""
    seconds = [trial.seconds for trial in trials.values()]
    return spent + sum(seconds) + 2 * max(seconds, default=0.0) > rounds.budget


def _leave_out_slow(
    trials: dict[str, Trial], fastest: float, rounds: Rounds, declined: dict[str, str]
) -> None:
    """Whoever would use up the time of a measurement, and is far behind our fastest, sits out.

    Also who answers: where kernels are not verified yet, that is the reference.
    """
    bearable = max(2 * rounds.budget / rounds.least, 3 * fastest)
    for name in [name for name, trial in trials.items() if trial.seconds > bearable]:
        declined[name] = f"too slow: one call takes {trials.pop(name).seconds:.2g} s"


def _try_one(
    case: Case,
    what: str,
    setting: Setting,
    contender: Contender,
    entry: Entry,
    expected: list[Tensor] | None,
) -> tuple[list[Tensor], Trial]:
    clock = setting.clock
    found: list[Any] = []
    seconds: list[float] = []

    def first() -> None:
        seconds.append(clock.sample(lambda: found.append(entry.run()), 1))

    num_bytes = None
    with entry.context():
        if case.large:
            on_cpu = setting.device.type == "cpu"
            num_bytes = resident.growth(first) if on_cpu else clock.peak_bytes(first)
        else:
            first()
        result = list(found.pop())
        if what == FORWARD:
            result = [case.meaningful(each) for each in result]
        else:
            result = alike(contender.call, result)
        truth = result if expected is None else expected
        difference = relative_difference(result, truth)
        cosine = None if contender.same else least_cosine(result, truth)
        if case.rounds is None or (setting.device.type != "cpu" and not case.once):
            seconds.append(clock.sample(entry.run, 1))
    return result, Trial(difference, seconds[-1], num_bytes, cosine)


def _peak_mib(entry: Entry, clock: Clock, trial: Trial) -> float | None:
    num_bytes = trial.peak_bytes
    if num_bytes is None:
        with entry.context():
            num_bytes = clock.peak_bytes(entry.run)
    return None if num_bytes is None else num_bytes / MIB


def _kept_mib(contender: Contender, what: str, run: Bound) -> float | None:
    """Only for calls with weights: what an op keeps is for its room to say."""
    if what == FORWARD or not isinstance(contender.call, Weighted):
        return None
    with context_of(contender, what)():
        return run.kept_bytes() / MIB


def _times(x: Spread, factor: float) -> Spread:
    return Spread(x.median * factor, x.low * factor, x.high * factor)
