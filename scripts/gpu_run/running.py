"""Steps as processes: their logs, their limits, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from gpu_run import machine as machines
from gpu_run.state import Entry, State, digest
from gpu_run.steps import Step
from gpu_run.verdicts import Verdict

_TAIL = 25  # lines of a red log to show
_SIGN_OF_LIFE = 30.0  # seconds
_GRACE = 5.0  # seconds between asking a process to end and making it


class Runner:
    """Does steps in order until the time is up, and writes down how each ended.

    resume: what is green, and was of the same inputs, is not done again
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        state: State,
        *,
        seconds: float = float("inf"),
        resume: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._root, self._folder, self._state = root, folder, state
        self._start = time.monotonic()
        self._end = self._start + seconds
        self._resume, self._tell = resume, say
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._interrupted = threading.Event()

    def run(self, steps: Sequence[Step]) -> None:
        """Do them; raises KeyboardInterrupt, with all processes ended, when asked to stop."""
        try:
            for together, group in groupby(steps, key=lambda step: step.together or step.name):
                several = list(group)
                width = max(step.width for step in several)
                with ThreadPoolExecutor(width, thread_name_prefix=together) as pool:
                    try:
                        list(pool.map(self._do, several))
                    except BaseException:
                        self.stop()
                        raise
        finally:
            self.stop()

    def stop(self) -> None:
        """End what is running."""
        self._interrupted.set()
        with self._lock:
            running = list(self._running)
        for process in running:
            _end(process)

    def _do(self, step: Step) -> None:
        about = digest(self._root, step)
        before = self._state.get(step.name)
        if self._resume and before and before.verdict is Verdict.GREEN and before.about == about:
            self._say(f"{step.name}: green, as before")
            return
        log = self._folder / "logs" / f"{step.name.replace(' ', '-')}.log"
        start = time.monotonic()
        verdict, note = self._attempt(step, log)
        seconds = time.monotonic() - start
        where = str(log.relative_to(self._folder)) if log.is_file() else ""
        if verdict is Verdict.LEFT and before is not None:
            return  # what was known stays known
        entry = Entry(verdict=verdict, seconds=seconds, note=note, log=where, about=about)
        self._state.put(step.name, entry)
        self._say(f"{step.name}: {verdict.value}, {seconds:.0f} s{note and f' ({note})'}")
        if verdict.bad and log.is_file():
            for line in _lines(log)[-_TAIL:]:
                self._tell(f"    | {line}")

    def _attempt(self, step: Step, log: Path) -> tuple[Verdict, str]:
        """What came of it; nothing is begun where something stands in the way."""
        log.unlink(missing_ok=True)
        if self._interrupted.is_set() or time.monotonic() >= self._end:
            return Verdict.LEFT, "the time was up"
        if step.absent:
            return Verdict.ABSENT, step.absent
        if (obstacle := self._obstacle(step)) is not None:
            return Verdict.SKIPPED, obstacle
        if step.ready is not None and (words := step.ready()):
            return Verdict.GREEN, words
        self._say(f"{step.name} ...")
        return self._carry_out(step, log)

    def _obstacle(self, step: Step) -> str | None:
        for name in step.unless_red:
            known = self._state.get(name)
            if known is not None and known.verdict.bad:
                return f"{name} is {known.verdict.value}"
        for name in step.after:
            known = self._state.get(name)
            if known is None or known.verdict not in (Verdict.GREEN, Verdict.EMPTY):
                return f"{name} is {known.verdict.value if known else Verdict.LEFT.value}"
        return None

    def _carry_out(self, step: Step, log: Path) -> tuple[Verdict, str]:
        log.parent.mkdir(parents=True, exist_ok=True)
        (self._folder / "probes").mkdir(exist_ok=True)
        limit = min(time.monotonic() + step.limit, self._end)
        for command in step.commands:
            status = self._process(step, command, log, limit)
            if status is None:
                if self._interrupted.is_set():
                    return Verdict.CUT, "interrupted"
                if time.monotonic() >= self._end:
                    return Verdict.CUT, "the time was up"
                return Verdict.OVERRAN, f"ended after {step.limit:.0f} s"
            if status:
                break
        return step.judge(status, log.read_text(errors="replace"))

    def _process(self, step: Step, command: Sequence[str], log: Path, limit: float) -> int | None:
        """The status of a command; None when it was ended."""
        env = {**machines.environment(), **step.env}
        with log.open("ab") as out:
            out.write(f"$ {' '.join(command)}\n".encode())
            out.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self._root,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # with all its children it can be ended
                )
            except OSError as error:
                out.write(f"{error}\n".encode())
                return 127
        with self._lock:
            self._running.add(process)
        try:
            return self._wait(step, process, log, limit)
        finally:
            with self._lock:
                self._running.discard(process)

    def _wait(
        self, step: Step, process: subprocess.Popen[bytes], log: Path, limit: float
    ) -> int | None:
        told = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= limit or self._interrupted.is_set():
                _end(process)
                return None
            try:
                status = process.wait(timeout=min(0.5, limit - now))
            except subprocess.TimeoutExpired:
                if time.monotonic() - told >= _SIGN_OF_LIFE:
                    told = time.monotonic()
                    self._say(f"{step.name}: still at it: {(_lines(log) or [''])[-1][:100]}")
                continue
            # interrupted meanwhile: the status is that of being ended
            return None if self._interrupted.is_set() and status < 0 else status

    def _say(self, text: str) -> None:
        with self._lock:
            self._tell(f"[{time.monotonic() - self._start:5.0f} s] {text}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session, kindly first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            continue


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
