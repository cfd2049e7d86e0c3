"""Plans in words: the tables that ``hunyuan-fast plan`` prints."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hunyuan_fast.planning.hardware import Hardware
from hunyuan_fast.planning.memory import PARTS, Memory
from hunyuan_fast.planning.published import Row
from hunyuan_fast.planning.search import GIB, Choice, Found, duration
from hunyuan_fast.planning.timing import Seconds
from hunyuan_fast.planning.work import Job

if TYPE_CHECKING:
    from hunyuan_fast.pipelines.probe import Comparison

_PARTS = Seconds.__slots__


def heading(job: Job, hardware: Hardware, gpus: int) -> str:
    """What is planned: the work, and the machines."""
    of_what = "sample" if job.training else "video"
    work = (
        f"{job.model}, {job.height} x {job.width} x {job.frames}: {job.parameters / 1e9:.4g} B "
        f"parameters, {job.tokens:,} tokens, {_flop(job.flops)} for each {of_what} and step"
    )
    what = _count(job.videos, of_what)
    what = f"training, {what} a step" if job.training else what
    return (
        f"{work}\n{what}, on {gpus} x {hardware.name}, {hardware.usable / GIB:.0f} GiB usable, "
        f"nodes of {hardware.node:g}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _flop(count: float) -> str:
    return f"{count / 1e15:.4g} PFLOP" if count >= 1e14 else f"{count / 1e9:.4g} GFLOP"


def plan(found: Found) -> str:
    """The best layouts, what bounds them, and why others lose."""
    lines = [heading(found.job, found.hardware, found.gpus), ""]
    if not found.best:
        lines += [
            f"nothing fits: the least is {found.least.total / GIB:.1f} GiB on each GPU, "
            f"{found.hardware.usable / GIB:.1f} GiB are usable",
            _memory(found.least),
        ]
    else:
        lines += list(_table(found))
        best = found.best[0]
        lines += ["", f"1. {best.layout}", f"   step: {_seconds(best.seconds)}"]
        lines += [f"   memory: {_memory(best.memory)}", f"   bound by {best.bound}"]
        if found.idle:
            lines.append(
                f"   {found.idle} of the {found.gpus} GPUs are left idle: no layout that was tried "
                "uses them and is faster"
            )
    if found.rejected:
        lines += ["", "why not"]
        lines += [f"   {each.layout}: {each.reason}" for each in found.rejected]
    return "\n".join(lines)


def _table(found: Found) -> Iterator[str]:
    training = found.job.training
    last = "samples/s" if training else "all steps"
    yield _row("", "step", "compute", "memory", "exposed", "of peak", "GiB", last)
    for number, choice in enumerate(found.best, 1):
        yield from (_line(number, choice, found), f"     {choice.layout}")


def _line(number: int, choice: Choice, found: Found) -> str:
    times, total = choice.seconds, choice.seconds.total
    job, hardware = found.job, found.hardware
    peak = job.flops * job.videos / total / (choice.layout.gpus * hardware.tflops * 1e12)
    last = f"{job.videos / total:.3g}" if job.training else duration(choice.whole)
    return _row(
        f"{number:>3}. {_count(choice.layout.gpus, 'GPU')}",
        duration(total),
        *(f"{part / total:.0%}" for part in (times.compute, times.memory, times.exposed)),
        f"{peak:.0%}",
        f"{choice.memory.total / GIB:.3g}",
        last,
    )


def _row(name: str, *cells: str) -> str:
    return f"{name:<16}" + "".join(f"{cell:>11}" for cell in cells)


def _seconds(times: Seconds) -> str:
    total = times.total
    parts = [(getattr(times, name), name) for name in _PARTS]
    shown = [f"{name} {duration(value)}" for value, name in parts if value > 0.0005 * total]
    return ", ".join(shown)


def _memory(memory: Memory) -> str:
    parts = [(getattr(memory, name), name) for name in PARTS]
    return ", ".join(f"{name} {value / GIB:.3g}" for value, name in parts if value) + " GiB"


def comparison(rows: "Sequence[Comparison]") -> str:
    """Predictions beside the clock."""
    width = max(len(row.name) for row in rows)
    lines = [" " * width + _row("", "measured", "predicted", "error")[16:]]
    for row in rows:
        cells = (duration(row.measured), duration(row.predicted), f"{row.error:+.0%}")
        lines.append(f"{row.name:<{width}}" + _row("", *cells)[16:])
    return "\n".join(lines)


def official(rows: Sequence[Row], attention_tflops: float) -> str:
    """The published table beside the predictions."""
    lines = [
        "13b, 720 x 1280 x 129, 50 steps, Ulysses over H100 SXM (assumed), programs of late 2024",
        _row("", "published", "predicted", "error", "fitted", "error"),
    ]
    for row in rows:
        cells = (f"{row.published:.0f} s", f"{row.predicted:.0f} s", f"{row.error:+.1%}")
        fitted = (f"{row.fitted:.0f} s", f"{row.fitted_error:+.1%}")
        lines.append(_row(_count(row.gpus, "GPU"), *cells, *fitted))
    lines.append(
        f"predicted: nothing fitted. fitted: attention at {attention_tflops:.0f} TFLOP/s, from the "
        "row of one GPU alone"
    )
    return "\n".join(lines)
