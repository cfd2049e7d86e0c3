"""One run on the terminal: ours, peers, floor."""

import math

from rich.console import Console
from rich.table import Table

from benchmarks.kit.contenders import OURS
from benchmarks.kit.machine import is_shared
from benchmarks.kit.record import Measurement, Result, Timing
from benchmarks.kit.statistics import Spread


def show(result: Result, console: Console) -> None:
    """Print every measurement of a run, and what to bear in mind when reading it."""
    machine = result.machine
    console.print(
        f"[bold]{result.op}[/] on {machine.device}, {machine.threads} threads of "
        f"{machine.cores} cores, torch {machine.torch}"
    )
    for measurement in result.measurements:
        console.print(table_of(measurement))
        for told in (rates(measurement), distances(measurement), cosines(measurement)):
            if told:
                console.print(f"  {told}", style="dim", soft_wrap=True)
        for name, reason in measurement.declined.items():
            console.print(f"  {name}: {reason}", style="dim", markup=False, soft_wrap=True)
    for a in result.alternations:
        console.print(
            f"{a.case} {a.dtype}: {a.name} in turn with {a.companion} takes "
            f"{number(a.ratio.median)} ({quartiles(a.ratio)}) of the time of both alone",
            soft_wrap=True,
        )
    for remark in remarks(result):
        console.print(remark, style="yellow", soft_wrap=True)


def table_of(m: Measurement) -> Table:
    """One pass of one case."""
    table = Table(title=title_of(m), title_justify="left", title_style="bold", show_edge=False)
    table.add_column("", no_wrap=True)
    memory = memory_columns(m)
    columns = ("ms", "quartiles", rate_unit(m), "x best peer", "of floor")
    for name in (*columns, *(f"{name} MiB" for name in memory)):
        table.add_column(name, justify="right")
    for t in m.timings:
        style = "green" if t.answers else "" if t.kind == OURS else "cyan"
        cells = [
            number(t.ms.median),
            quartiles(t.ms),
            number(rate(m, t.ms.median)),
            number(t.speedup.median) if t.speedup else "",
            f"{t.of_floor.median:.0%}",
        ]
        for values in memory.values():
            value = values[t.name]
            cells.append("" if value is None else number(value))
        table.add_row(label(t), *cells, style=style)
    floor = [number(m.floor_ms.median), quartiles(m.floor_ms), number(rate(m, m.floor_ms.median))]
    table.add_row(f"floor ({m.bound})", *floor, "", "100%", style="dim")
    return table


def memory_columns(m: Measurement) -> dict[str, dict[str, float | None]]:
    """MiB by contender, at the peak and kept for backward, where it was counted for any."""
    found = {
        "peak": {t.name: t.peak_mib for t in m.timings},
        "kept": {t.name: t.kept_mib for t in m.timings},
    }
    return {
        kind: values
        for kind, values in found.items()
        if any(value is not None for value in values.values())
    }


def remarks(result: Result) -> list[str]:
    """What makes the figures of a run less than evidence."""
    found = []
    if is_shared(result.neighbours):
        found.append(
            f"The machine was shared: other processes took {result.neighbours:.0%} of its cores. "
            "All figures are rough, and in favour of whoever waits least for other threads."
        )
    if result.tests == "skipped":
        found.append("The tests were not run.")
    if result.quick:
        found.append("Quick run: small shapes, few rounds.")
    return found


def rates(m: Measurement) -> str | None:
    """Arithmetic per second of everyone, of a matrix product and of a convolution, in one run."""
    if m.conv3d_tflop_per_s is None or m.matmul_tflop_per_s is None or m.plain_flops is None:
        return None
    reached = (
        f"{t.name} {number(m.num_flops / t.ms.median / 1e9)} "
        f"(layers as written {number(m.plain_flops / t.ms.median / 1e9)})"
        for t in m.timings
    )
    return (
        f"TFLOP/s: {', '.join(reached)}; conv3d {number(m.conv3d_tflop_per_s)}, "
        f"matmul {number(m.matmul_tflop_per_s)}"
    )


def distances(m: Measurement) -> str | None:
    """How far results lie from the first one's, as signal to noise, where rates are told."""
    others = [t for t in m.timings if t.difference > 0]
    if rates(m) is None or not others:
        return None
    first = next((t.name for t in m.timings if t.difference == 0), "the first")
    noise = (f"{t.name} {-20 * math.log10(t.difference):.1f} dB" for t in others)
    return f"signal to noise against {first}: {', '.join(noise)}"


def cosines(m: Measurement) -> str | None:
    """How alike results are that are others by design."""
    told = [t for t in m.timings if t.cosine is not None and t.difference > 0]
    first = next((t.name for t in m.timings if t.difference == 0), "the first")
    found = (f"{t.name} {t.cosine:.5f} (difference {t.difference:.2g})" for t in told)
    return f"cosine to {first}: {', '.join(found)}" if told else None


def title_of(m: Measurement) -> str:
    """Function, case, sizes, dtype and pass."""
    sizes = " ".join(f"{letter}={size}" for letter, size in m.shape.items())
    return f"{m.function} {m.case} ({sizes}) {m.dtype}, {m.what}"


def label(t: Timing) -> str:
    """The name, and whether a call gets this one without asking."""
    if t.answers:
        return f"{t.name} (answers)"
    return t.name if t.kind != OURS else f"{t.name} (ours)"


def rate_unit(m: Measurement) -> str:
    """What the floor is counted in."""
    return "GB/s" if m.bound == "memory" else "TFLOP/s"


def rate(m: Measurement, milliseconds: float) -> float:
    """The least work of the measurement, done in so many milliseconds, in ``rate_unit``."""
    work = m.num_bytes / 1e9 if m.bound == "memory" else m.num_flops / 1e12
    return work / (milliseconds / 1e3)


def quartiles(x: Spread) -> str:
    """From and to."""
    return f"{number(x.low)} to {number(x.high)}"


def number(x: float) -> str:
    """Three significant digits, at most three decimals, never in scientific notation."""
    decimals = 0 if x >= 100 else 1 if x >= 10 else 2 if x >= 1 else 3
    return f"{x:.{decimals}f}"
