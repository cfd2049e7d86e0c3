"""The best layouts of a job for so many GPUs, with what bounds them and why others lose."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

from hunyuan_fast.planning.hardware import Hardware
from hunyuan_fast.planning.layouts import Layout, geometries, objections, states
from hunyuan_fast.planning.memory import Memory, memory
from hunyuan_fast.planning.timing import Clock, Practice, Seconds
from hunyuan_fast.planning.work import KINDS, Job

GIB = 2**30
_CAUSES = {
    "ring": "hops of the ring that attention does not hide",
    "ulysses": "all-to-alls of heads and tokens",
    "tp": "reductions over the tensor-parallel group",
    "weights": "gathering weights",
    "gradients": "reducing gradients",
    "host": "transfers from and to host memory",
    "optimiser": "the optimiser's step",
    "kernels": "starting kernels",
    "memory": "reads and writes of memory",
    "matrices": "matrix products",
    "attention": "attention",
}


@dataclass(frozen=True)
class Choice:
    """A layout with what is predicted for it: one step, memory of a GPU, whole videos."""

    layout: Layout
    seconds: Seconds
    memory: Memory
    whole: float

    @property
    def bound(self) -> str:
        """What most of the step goes to: compute, memory, exposed communication, or the rest."""
        seconds = self.seconds
        shares = {
            "compute": seconds.compute,
            "memory": seconds.memory + seconds.optimiser,
            "communication": seconds.exposed,
            "kernel starts": seconds.kernels,
        }
        return max(shares, key=shares.__getitem__)


@dataclass(frozen=True)
class Rejection:
    """A layout that somebody might have expected, and why it is not the best."""

    layout: Layout
    reason: str


@dataclass(frozen=True)
class Found:
    """What a search gives: the best first; empty where nothing fits."""

    job: Job
    hardware: Hardware
    gpus: int
    best: tuple[Choice, ...]
    rejected: tuple[Rejection, ...]
    least: Memory
    """The smallest memory of a GPU among all that was tried."""

    @property
    def idle(self) -> int:
        """GPUs that the best layout leaves out."""
        return self.gpus - self.best[0].layout.gpus if self.best else 0


def search(
    job: Job,
    hardware: Hardware,
    gpus: int,
    *,
    top: int = 3,
    practice: Practice | None = None,
    explain: bool = True,
) -> Found:
    """Try all layouts on at most `gpus` GPUs; keep the `top` fastest geometries that fit.

    Geometries are tried in the order of a bound that no layout of theirs can beat, until it is
    above the last one that is kept.
    """
    clock = Clock(job, hardware, practice)
    best: list[tuple[float, int, Choice]] = []  # a heap, the slowest on top
    too_large: dict[str, Choice] = {}
    least: Memory | None = None
    bounded = _bounded(clock, gpus)
    for number, (bound, geometry) in enumerate(bounded):
        if len(best) == top and bound > -best[0][0]:
            break
        choice: Choice | None = None
        for layout in states(geometry, job):
            needs = memory(layout, job)
            least = needs if least is None or needs.total < least.total else least
            fits = needs.total <= hardware.usable
            if not fits and not explain:
                continue
            seconds = clock.step(layout)
            if not fits:
                _note(too_large, Choice(layout, seconds, needs, 0.0))
            elif choice is None or seconds.total < choice.seconds.total:
                choice = Choice(layout, seconds, needs, 0.0)
                if not job.training:
                    break  # what follows only saves memory
        if choice is not None:
            heapq.heappush(best, (-choice.seconds.total, -number, choice))
            if len(best) > top:
                heapq.heappop(best)
    assert least is not None, "there is always the layout of one GPU"
    chosen = [replace(c, whole=clock.video(c.layout)) for _, _, c in sorted(best, reverse=True)]
    rejected = []
    if explain:
        whole = [layout for _, layout in bounded if layout.gpus == gpus][:1]
        rejected = _rejections(clock, [*whole, *_plain(job, hardware, gpus)], chosen, too_large)
    return Found(job, hardware, gpus, tuple(chosen), tuple(rejected), least)


def _bounded(clock: Clock, gpus: int) -> list[tuple[float, Layout]]:
    """Geometries with a time that they cannot beat, from the least.

    It is that of the blocks alone, once more forward where memory leaves no other way.
    """
    job, usable = clock.job, clock.hardware.usable
    depths = [(kind, job.depth(kind)) for kind in KINDS if job.depth(kind)]
    known: dict[Layout, float] = {}
    found = []
    for layout in geometries(job, gpus):
        alone = replace(layout, dp=1) if layout.dp > 1 else layout
        if alone not in known:
            blocks = clock.blocks(alone)
            seconds = sum(blocks[kind][0].total * depth for kind, depth in depths)
            if job.training:
                if memory(replace(alone, zero=3, offload=True), job).total > usable:
                    seconds *= 2
                seconds += sum(blocks[kind][1].total * depth for kind, depth in depths)
            known[alone] = seconds
        found.append((known[alone] * -(-job.videos // layout.dp), layout))
    found.sort(key=lambda pair: pair[0])
    return found


def _note(too_large: dict[str, Choice], choice: Choice) -> None:
    """Keep the fastest layout of those that do not fit, for each largest part of their memory."""
    known = too_large.get(choice.memory.largest)
    if known is None or choice.seconds.total < known.seconds.total:
        too_large[choice.memory.largest] = choice


def _rejections(
    clock: Clock, plain: list[Layout], chosen: list[Choice], too_large: dict[str, Choice]
) -> list[Rejection]:
    """Why not those that would be faster, and why not the plain ones."""
    found = []
    usable = clock.hardware.usable
    first = chosen[0] if chosen else None
    for choice in sorted(too_large.values(), key=lambda c: c.seconds.total):
        if first is None or choice.seconds.total < first.seconds.total:
            found.append(Rejection(choice.layout, _too_large(choice, usable)))
    for layout in dict.fromkeys(plain):
        if first is None or layout == _geometry(first.layout):
            continue
        wrong = objections(layout, clock.job)
        if wrong:
            found.append(Rejection(layout, wrong[0]))
            continue
        tried = [(clock.step(each), each) for each in states(layout, clock.job)]
        fitting = [pair for pair in tried if memory(pair[1], clock.job).total <= usable]
        if not fitting:
            smallest = min(tried, key=lambda pair: memory(pair[1], clock.job).total)[1]
            lacking = Choice(smallest, clock.step(smallest), memory(smallest, clock.job), 0.0)
            found.append(Rejection(smallest, _too_large(lacking, usable)))
            continue
        seconds, best = min(fitting, key=lambda pair: pair[0].total)
        found.append(Rejection(best, _slower(seconds, first.seconds)))
    return found


def _plain(job: Job, hardware: Hardware, gpus: int) -> list[Layout]:
    """All GPUs given to one thing, and tensor parallelism within nodes."""
    if gpus == 1:
        return []
    found = [Layout(dp=gpus), Layout(ring=gpus), Layout(ulysses=gpus)]
    found.append(Layout(tp=gpus, sequence_parallel=True))
    node = int(hardware.node)
    if gpus > node and gpus % node == 0:
        dp = min(gpus // node, job.videos)
        found.append(Layout(dp, gpus // node // dp, 1, node, True))
        found.append(Layout(dp, gpus // node // dp, node))
    return found


def _geometry(layout: Layout) -> Layout:
    return replace(layout, zero=0, recompute=False, offload=False)


def _too_large(choice: Choice, usable: float) -> str:
    needs = choice.memory
    names = {
        "weights": "weights",
        "states": "gradients and the optimiser's state",
        "buffers": "buffers of communication",
        "kept": "what is kept for backward",
        "busy": "what lives meanwhile",
        "companions": "text models and autoencoder",
    }
    largest = names[needs.largest]
    part = getattr(needs, needs.largest)
    return (
        f"needs {needs.total / GIB:.0f} GiB of {usable / GIB:.0f}, "
        f"{part / GIB:.0f} of them {largest}; it would take {duration(choice.seconds.total)}"
    )


def _slower(seconds: Seconds, best: Seconds) -> str:
    """How much slower, and what takes the difference."""
    more = {name: getattr(seconds, name) - getattr(best, name) for name in _CAUSES}
    worst = max(more, key=more.__getitem__)
    ratio = seconds.total / best.total
    if ratio < 1.0005:
        return "as fast"
    slower = f"{ratio - 1:.1%} slower" if ratio < 2 else f"{ratio:.1f} times as long"
    return f"{duration(seconds.total)}, {slower}: {duration(more[worst])} more for {_CAUSES[worst]}"


def duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"
