"""What a ring of processes does when: compute and messages of every hop, as a plot and as traces.

python -m benchmarks.ring_timeline [FOLDER]

Processes of this machine talk through gloo, over links that are made as slow as it takes for a
message to need three quarters of the compute of a hop. Every process writes a trace of the torch
profiler, for chrome://tracing or ui.perfetto.dev; the plot has compute and waiting from there, and
messages from the link.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed import barrier, group
from torch.profiler import ProfilerActivity, profile, record_function

from hunyuan_fast.distributed.rotation import WAIT
from hunyuan_fast.ops.ring_attention import COMPUTE, ring_attention
from tests.kit.links import slow_link
from tests.kit.ranks import rank_pool

RANKS = 4
LENGTH, HEADS, DIM = 2048, 4, 64  # tokens of each process
_START, _BACKWARD = "start", "backward"
_SHARE = 0.75  # of the compute of a hop that a message takes
_COLORS = {COMPUTE: "#1a7f37", WAIT: "#b3261e", "message": "#9aa4b1"}
_ROWS = {COMPUTE: 0.25, WAIT: 0.25, "message": -0.2}


@dataclass(frozen=True)
class Timeline:
    """Seconds since the start of a step, on one process.

    spans: (kind, from, to)    backward: when the backward pass began    end: of the step
    """

    spans: list[tuple[str, float, float]]
    backward: float
    end: float

    @property
    def exposed(self) -> float:
        """The share of the step that was spent waiting."""
        return sum(end - start for kind, start, end in self.spans if kind == WAIT) / self.end


def step(length: int, trace: str | None) -> Timeline:
    """One forward and backward pass of this process, watched by the profiler."""
    rank, ranks = group.WORLD.rank(), group.WORLD.size()
    heads = [torch.randn(1, length, HEADS, DIM).requires_grad_() for _ in range(3)]
    options: dict[str, Any] = {"lengths": (length,) * ranks, "group": group.WORLD}
    ring_attention(*heads, **options).sum().backward()
    bandwidth = _bandwidth(heads, options)
    with slow_link(0.0, bandwidth) as link, profile(activities=[ProfilerActivity.CPU]) as found:
        barrier()  # a profiler starts when it likes
        with record_function(_START):
            zero = time.perf_counter()
        out = ring_attention(*heads, **options)
        backward = time.perf_counter() - zero
        out.backward(torch.ones_like(out))
        end = time.perf_counter() - zero
    if trace is not None:
        found.export_chrome_trace(f"{trace}-rank{rank}.json")
    events = [e for e in found.events() if e.name in (_START, COMPUTE, WAIT)]
    first = next(e.time_range.start for e in events if e.name == _START)
    spans = [
        (e.name, (e.time_range.start - first) / 1e6, (e.time_range.end - first) / 1e6)
        for e in events
        if e.name != _START
    ]
    spans += [("message", start - zero, there - zero) for start, there in link.transfers]
    return Timeline(spans, backward, end)


def _bandwidth(heads: list[Any], options: dict[str, Any]) -> float:
    """That with which keys and values take the given share of the forward compute of a hop."""
    hops, best = len(options["lengths"]), float("inf")
    with torch.no_grad():
        for _ in range(3):
            barrier()
            start = time.perf_counter()
            ring_attention(*heads, **options)
            best = min(best, (time.perf_counter() - start) / hops)
    slowest = torch.tensor([2 * heads[1].nbytes / (_SHARE * best)])
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MIN)
    return float(slowest)


def timelines(folder: Path | None, *, length: int) -> list[Timeline]:
    """Of every process; their traces go into the folder."""
    trace = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        trace = str(folder.resolve() / "ring_attention")
    with rank_pool() as pool:
        return pool.run(RANKS, step, length, trace)


def draw(found: list[Timeline], path: Path) -> None:
    """Two lanes for each process: compute and waiting, and messages on their way to it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 1.0 + 0.9 * len(found)), layout="constrained")
    axis = figure.subplots()
    for rank, timeline in enumerate(found):
        for kind, start, end in timeline.spans:
            row = len(found) - 1 - rank + _ROWS[kind]
            axis.barh(
                *(row, 1e3 * (end - start), 0.38, 1e3 * start),
                color=_COLORS[kind],
                edgecolor="white",
                linewidth=0.6,
            )
        row = len(found) - 1 - rank
        axis.vlines(1e3 * timeline.backward, row - 0.45, row + 0.48, color="black", linewidth=1.2)
    labels = [f"rank {rank}: waits {t.exposed:.0%}" for rank, t in enumerate(found)]
    axis.set_yticks(range(len(found)), labels[::-1])
    axis.set_xlabel("milliseconds; where a black line is, the backward pass begins")
    kinds = {COMPUTE: "compute", WAIT: "waiting", "message": "message"}
    patches = [Patch(color=_COLORS[kind], label=label) for kind, label in kinds.items()]
    axis.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(f"ring attention on {len(found)} processes, a message: {_SHARE:.0%} of a hop")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> int:
    """Run, print what was waited for, and write plot and traces."""
    console = Console(highlight=False)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ring_attention")
    found = timelines(folder, length=LENGTH)
    for rank, timeline in enumerate(found):
        console.print(f"rank {rank}: {1e3 * timeline.end:.0f} ms, {timeline.exposed:.1%} waiting")
    draw(found, folder / "timeline.png")
    console.print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
