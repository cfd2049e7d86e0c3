"""Where time and memory go: one row per stage, and a progress bar meanwhile."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


@dataclass(frozen=True)
class Stage:
    """A finished stage: seconds, and peak memory in bytes (``device_peak`` None without a GPU)."""

    name: str
    seconds: float
    host_peak: int
    device_peak: int | None


class Stages:
    """Times named stages one after the other and shows a bar for the one that is running.

    An instance is the ``progress(stage, step, total)`` callback that the pipelines take.
    """

    def __init__(self, device: str, console: Console) -> None:
        self.finished: list[Stage] = []
        self._cuda = device if device.startswith("cuda") else None
        self._console = console
        self._name: str | None = None
        self._started = 0.0
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._progress.stop()

    def __call__(
        self, stage: str, step: int, total: int, figures: Mapping[str, float] | None = None
    ) -> None:
        """Report that ``step`` of ``total`` steps of ``stage`` are done; a new name starts it.

        ``figures`` (a loss, say) are shown behind the bar.
        """
        if stage != self._name:
            self._begin(stage, total)
        if self._task is not None:
            note = "  ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
            self._progress.update(self._task, completed=step, total=total, note=note)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of one step."""
        self(name, 0, 1)
        yield
        self(name, 1, 1)

    def table(self) -> Table:
        """Time and peak memory of every stage and of the whole."""
        table = Table("stage", box=None, pad_edge=False)
        for heading in ("time", "memory", *(("GPU memory",) if self._cuda else ())):
            table.add_column(heading, justify="right")
        total = Stage(
            "total",
            sum(stage.seconds for stage in self.finished),
            max(stage.host_peak for stage in self.finished),
            max(stage.device_peak or 0 for stage in self.finished),
        )
        for stage in (*self.finished, total):
            row = [stage.name, f"{stage.seconds:.1f} s", _bytes(stage.host_peak)]
            table.add_row(*row, *([_bytes(stage.device_peak or 0)] if self._cuda else []))
        return table

    def _begin(self, name: str, total: int) -> None:
        self._finish()
        _reset_host_peak()
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._name, self._started = name, time.perf_counter()
        self._task = self._progress.add_task(name, total=total, note="")
        if not self._console.is_terminal:
            self._console.print(f"{name} ...", markup=False)

    def _finish(self) -> None:
        if self._name is None:
            return
        peak = None
        if self._cuda:
            import torch

            torch.cuda.synchronize(self._cuda)
            peak = torch.cuda.max_memory_allocated(self._cuda)
        seconds = time.perf_counter() - self._started
        self.finished.append(Stage(self._name, seconds, _host_peak(), peak))
        self._name = None


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr that prints text as it is, without markup."""
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _reset_host_peak() -> None:
    """Start a new peak where the system can (Linux); elsewhere the peak is that of the process."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def _host_peak() -> int:
    """Peak resident memory in bytes since the last reset."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
