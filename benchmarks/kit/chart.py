"""Bars of milliseconds against the floor, as a PNG."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.kit.contenders import OURS
from benchmarks.kit.record import Measurement, Result
from benchmarks.kit.table import label, number

_COLORS = {"answers": "#1a7f37", "ours": "#7fbf8f", "peer": "#9aa4b1"}
_FLOOR = "#b3261e"
_COLUMNS = 2


def can_draw() -> bool:
    """Whether matplotlib, the extra ``bench``, is installed."""
    return find_spec("matplotlib") is not None


def draw(result: Result, path: Path) -> None:
    """One panel for each pass of each case: a bar per contender, a line at the floor."""
    from matplotlib.figure import Figure

    panels = len(result.measurements)
    rows = -(-panels // _COLUMNS)
    bars = max(len(m.timings) for m in result.measurements)
    figure = Figure(figsize=(11, rows * (0.9 + 0.32 * bars)), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axis, measurement in zip(axes, result.measurements, strict=False):
        _panel(axis, measurement)
    for axis in axes[panels:]:
        axis.set_visible(False)
    figure.suptitle(f"{result.op} on {result.machine.device}, torch {result.machine.torch}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _panel(axis: Any, m: Measurement) -> None:
    names = [label(t) for t in m.timings]
    medians = [t.ms.median for t in m.timings]
    reach = [
        [t.ms.median - t.ms.low for t in m.timings],
        [t.ms.high - t.ms.median for t in m.timings],
    ]
    colors = [_COLORS["answers" if t.answers else t.kind] for t in m.timings]
    bars = axis.barh(names, medians, xerr=reach, color=colors, ecolor="#444444")
    axis.bar_label(bars, [number(x) for x in medians], padding=4, fontsize=8)
    axis.axvline(m.floor_ms.median, color=_FLOOR, linestyle="--", linewidth=1)
    axis.set_title(f"{m.function} {m.case}, {m.dtype}, {m.what}", fontsize=9)
    axis.set_xlabel(f"ms; dashed: floor ({m.bound})", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    for tick, t in zip(axis.get_yticklabels(), m.timings, strict=True):
        tick.set_fontweight("bold" if t.kind == OURS else "normal")
