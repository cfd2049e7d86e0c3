"""``docs/performance.md``: what the committed results say, and what no result says yet."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.kit.contenders import OURS
from benchmarks.kit.discover import ROOT, WHOLES
from benchmarks.kit.machine import is_shared
from benchmarks.kit.record import Measurement, Result, Timing, loads
from benchmarks.kit.table import cosines, distances, memory_columns, number, rates, title_of

PAGE = Path("docs/performance.md")
_RESULTS = "benchmarks/results"
_GPU_IMPLEMENTATIONS = ("cuda_impl", "triton_impl", "library_impl")
_HEAD = """\
# Performance

Made by `python -m benchmarks --summary` from the committed results in
[`benchmarks/results`](../benchmarks/results), and from nothing else: do not edit.
[How it is measured](benchmarks.md). *x best peer*: how many times as fast as the fastest peer.
*of floor*: how much of the time is what a copy of the same bytes, or a matrix product of the same
FLOPs, takes on that machine in the same run.
"""


def committed_results(root: Path = ROOT) -> dict[str, Result]:
    """The results in the last commit, by path. Raises RuntimeError outside of a git checkout."""
    listing = _git(root, "ls-tree", "-r", "--name-only", "HEAD", "--", _RESULTS)
    paths = [path for path in listing.splitlines() if path.endswith(".json")]
    return {path: loads(_git(root, "show", f"HEAD:{path}"), path) for path in sorted(paths)}


def gpu_implementations(root: Path = ROOT) -> dict[str, list[str]]:
    """For every op the implementations that are meant for GPUs, as the files in its room say.

    In place of library_impl the libraries behind it, where there is more than one.
    """
    found: dict[str, list[str]] = {}
    for name in _GPU_IMPLEMENTATIONS:
        for path in sorted(root.glob(f"kernels/*/{name}.py")):
            libraries = sorted(path.parent.glob("libraries/[!_]*.py"))
            several = [f"{name}.{each.stem}" for each in libraries if each.stem[:4] != "cpu_"]
            names = several if name == "library_impl" and several else [name]
            found.setdefault(path.parent.name, []).extend(names)
    return dict(sorted(found.items()))


def render(results: Mapping[str, Result], implementations: Mapping[str, Sequence[str]]) -> str:
    """The page. The same results give the same text."""
    parts = [_HEAD]
    by_device: dict[str, dict[str, Result]] = {}
    for path, result in results.items():
        by_device.setdefault(path.split("/")[-2], {})[path] = result
    if not results:
        parts.append("No result is committed yet: `python -m benchmarks` on a quiet machine.\n")
    for of_device in by_device.values():
        parts.append(_device_section(of_device))
    parts.append(_unverified_section(results.values(), implementations))
    return "\n".join(parts)


def _device_section(results: Mapping[str, Result]) -> str:
    machine = next(iter(results.values())).machine
    lines = [f"## {machine.device} ({machine.arch}, {machine.cores} cores)", ""]
    for path, result in results.items():
        lines += [f"### {result.op}", "", _provenance(result), ""]
        lines += [
            "| case | ours | ms | best peer | ms | x best peer | of floor |",
            "|---|---|--:|---|--:|--:|--:|",
        ]
        lines += [_row(m) for m in result.measurements]
        lines.append("")
        if result.op in WHOLES:
            lines += _memory_table(result)
            for m in result.measurements:
                told = [each for each in (rates(m), distances(m), cosines(m)) if each]
                lines += [f"- {title_of(m)}: {'; '.join(told)}."] if told else []
            lines.append("")
        for a in result.alternations:
            if a.kind == OURS:
                lines.append(
                    f"In turn with torch's {a.companion} ({a.case}, {a.dtype}) `{a.name}` takes "
                    f"{number(a.ratio.median)} of the time of both alone.\n"
                )
        chart = Path(path).with_suffix(".png")
        lines += [f"![{result.op}](../{chart.as_posix()})", ""]
    return "\n".join(lines)


def _memory_table(result: Result) -> list[str]:
    """MiB of everyone in every pass where memory was counted; nothing where it never was."""
    names = list(dict.fromkeys(t.name for m in result.measurements for t in m.timings))
    rows = []
    for m in result.measurements:
        for kind, values in memory_columns(m).items():
            found = (values.get(name) for name in names)
            cells = ["" if value is None else number(value) for value in found]
            rows.append(f"| {' | '.join([title_of(m), kind, *cells])} |")
    if not rows:
        return []
    head = f"| {' | '.join(['case', 'MiB', *names])} |"
    return [head, "|---|---|" + len(names) * "--:|", *rows, ""]


def _provenance(result: Result) -> str:
    m, s = result.machine, result.source
    versions = [f"torch {m.torch}", f"python {m.python}", f"{m.threads} threads"]
    if m.driver:
        versions.append(f"driver {m.driver}")
    text = f"`{s.command}` at {(s.commit or 'unknown')[:10]}, {s.date}; {', '.join(versions)}."
    if is_shared(result.neighbours):
        text += (
            f" **The machine was shared:** other processes took {result.neighbours:.0%} of its "
            "cores, so all figures are rough."
        )
    return text


def _row(m: Measurement) -> str:
    ours = answering(m)
    peer = next((t for t in m.timings if t.name == m.best_peer), None)
    cells = [
        title_of(m),
        ours.name,
        number(ours.ms.median),
        peer.name if peer else "",
        number(peer.ms.median) if peer else "",
        number(ours.speedup.median) if ours.speedup else "",
        f"{ours.of_floor.median:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def answering(m: Measurement) -> Timing:
    """What a call gets without asking for anything by name; else the fastest of ours."""
    ours = [t for t in m.timings if t.kind == OURS]
    return next((t for t in ours if t.answers), min(ours, key=lambda t: t.ms.median))


def _unverified_section(
    results: Iterable[Result], implementations: Mapping[str, Sequence[str]]
) -> str:
    measured = {
        (result.op, timing.name)
        for result in results
        if result.machine.arch != "cpu"
        for measurement in result.measurements
        for timing in measurement.timings
    }
    lines = [
        "## Kernels without a result on a GPU",
        "",
        "They do not answer by themselves. `make gpu`, on a machine with one, makes the results.",
        "",
        "| op | implementation | state |",
        "|---|---|---|",
    ]
    for op, names in implementations.items():
        for name in names:
            if (op, name) not in measured:
                lines.append(f"| {op} | {name} | unverified: no committed result on a GPU |")
    return "\n".join([*lines, ""])


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"only committed results are shown, and git says: {done.stderr.strip()}")
    return done.stdout
