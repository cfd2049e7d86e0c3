"""The scaling curve of a plan, drawn into a PNG."""

from importlib.util import find_spec
from pathlib import Path

from hunyuan_fast.cli.errors import CommandError
from hunyuan_fast.planning.hardware import Hardware
from hunyuan_fast.planning.search import GIB, Choice, search
from hunyuan_fast.planning.work import Job


def require_matplotlib() -> None:
    """Raise CommandError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise CommandError("-o needs matplotlib: pip install 'hunyuan-fast[bench]'")


def counts(most: int) -> list[int]:
    """Powers of two up to `most`, and `most`."""
    return sorted({2**n for n in range(most.bit_length())} | {most})


def scaling(job: Job, hardware: Hardware, most: int) -> list[tuple[int, Choice]]:
    """The best layout for growing numbers of GPUs, where any fits."""
    found = ((n, search(job, hardware, n, top=1, explain=False).best) for n in counts(most))
    return [(n, best[0]) for n, best in found if best]


def draw(job: Job, hardware: Hardware, most: int, path: Path) -> None:
    """Time of a step beside ideal scaling, where it goes, and the memory of a GPU."""
    curve = scaling(job, hardware, most)
    if not curve:
        raise CommandError(f"nothing fits on any number of GPUs up to {most}; no curve to draw")
    from matplotlib.figure import Figure

    xs = [n for n, _ in curve]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    times, parts, memory = figure.subplots(1, 3)
    ys = [choice.seconds.total for _, choice in curve]
    times.plot(xs, ys, marker="o", label="best layout")
    times.plot(xs, [ys[0] * xs[0] / n for n in xs], "--", color="grey", label="ideal")
    times.set(yscale="log", xlabel="GPUs", ylabel="seconds a step")
    shares = {
        "compute": [c.seconds.compute / c.seconds.total for _, c in curve],
        "memory": [(c.seconds.memory + c.seconds.optimiser) / c.seconds.total for _, c in curve],
        "kernel starts": [c.seconds.kernels / c.seconds.total for _, c in curve],
        "exposed communication": [c.seconds.exposed / c.seconds.total for _, c in curve],
    }
    parts.stackplot(xs, list(shares.values()), labels=list(shares))
    parts.set(xlabel="GPUs", ylabel="share of the step", ylim=(0, 1))
    memory.plot(xs, [c.memory.total / GIB for _, c in curve], marker="o", label="needed")
    memory.axhline(hardware.usable / GIB, linestyle="--", color="grey", label="usable")
    memory.set(xlabel="GPUs", ylabel="GiB on each GPU", ylim=(0, None))
    shown = [n for n in xs if n == xs[0] or (n & (n - 1) == 0 and n.bit_length() % 2)]
    for panel in (times, parts, memory):
        panel.set_xscale("log", base=2)
        panel.set_xticks(shown, [str(n) for n in shown])
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    what = "training" if job.training else "inference"
    size = f"{job.height} x {job.width} x {job.frames}"
    figure.suptitle(f"{job.model}, {size}, {what} on {hardware.name}: predicted", fontsize=10)
    figure.savefig(path, dpi=110)
