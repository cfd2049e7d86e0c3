"""No process of a job outlives the others, whatever its main thread is waiting for.

A thread of each process listens to the hub and to signals. A main thread that sits in a collective
hears of neither: it is sent a signal, and when that does not end it in time, the thread ends the
process.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import cast

from hunyuan_fast.distributed.job import Job
from hunyuan_fast.distributed.verdict import DEATH, STATUS, End, Kind, Verdict, judge
from hunyuan_fast.distributed.wire import Wire

# For the main thread to remove what is half-written, once the job is over.
GRACE = 4.0
# For the verdict, once this process has said how it ended.
PATIENCE = 15.0
TICK = 0.5

# The kind of an exception, and the line that tells it to the user.
Explain = Callable[[BaseException], tuple[Kind, str]]


class Stopped(BaseException):
    """The job is over, or SIGTERM has come: raised in the main thread wherever it is."""


class Lifeline:
    """The connection of this process to the hub of its job.

    The main thread makes it, and it takes SIGINT and SIGTERM over. The first process of each
    machine prints the verdict.

    address: of the hub, where rank 0 runs
    program: what printed lines begin with
    """

    def __init__(self, job: Job, address: str, program: str) -> None:
        self._job, self._program = job, program
        self._name = socket.gethostname()
        self._launcher = job.launcher
        self._said: Kind | None = None
        self._saying = threading.Lock()
        self._leaving = False
        self._verdict: Verdict | None = None
        self._over = threading.Event()
        self._exit_at: float | None = None
        port, token = address.split()
        self._wire = Wire(socket.create_connection((job.host, int(port)), timeout=60))
        self._wire.send(rank=job.rank, token=token, host=self._name)
        self._main = threading.get_ident()
        self._signals, self._wakeup = socket.socketpair()
        self._take_signals()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def live(self, work: Callable[[], None], explain: Explain) -> None:
        """Do the work of this process, and return when all have done theirs.

        When any has not, the process ends here, with the status of the verdict: nothing is waited
        for that may never come.
        """
        try:
            work()
            kind, text = "done", ""
        except (Stopped, KeyboardInterrupt) as stop:
            kind = text = "interrupted" if isinstance(stop, KeyboardInterrupt) else "terminated"
        except BaseException as error:
            kind, text = explain(error)
        verdict = self.end(cast(Kind, kind), text)
        if verdict.kind != "done":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(verdict.status)
        self._give_signals_back()

    def end(self, kind: Kind, text: str = "") -> Verdict:
        """Say how this process ended, and wait for how the job does.

        After "done" that takes as long as the work of the others; anything else ends them.
        """
        self._leaving = True
        self._say(kind, text)
        self._over.wait(None if kind == "done" else PATIENCE)
        if self._verdict is None:  # the hub does not answer
            own = End(self._job.rank, self._name, kind, text)
            self._verdict = judge([own], self._job.world_size) or Verdict(kind)
            self._print(self._verdict)
        return self._verdict

    def _take_signals(self) -> None:
        """A thread cannot handle signals, but it can read that they have come."""
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)

    def _give_signals_back(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """In the main thread: leave, once."""
        if not self._leaving:
            self._leaving = True
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    def _say(self, kind: Kind, text: str) -> None:
        """The first word counts: what follows is a consequence."""
        with self._saying:
            if self._said is None:
                self._said = kind
                self._wire.send(kind=kind, text=text)

    def _watch(self) -> None:
        sources: list[Wire | socket.socket] = [self._wire, self._signals]
        while self._exit_at is None or time.monotonic() < self._exit_at:
            for source in select.select(sources, [], [], TICK)[0]:
                if source is self._signals:
                    self._on_signals(self._signals.recv(64))
                elif (messages := self._wire.receive()) is None:
                    sources.remove(self._wire)
                    self._on_silence()
                else:
                    for message in messages:
                        self._on_verdict(Verdict(message["kind"], tuple(message["lines"])))
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                self._leave_soon("failed", "error: the launcher is gone")
        # no way to go but this one: the main thread does not come back from where it is
        os._exit(self._verdict.status if self._verdict else STATUS[self._said or "terminated"])

    def _on_signals(self, numbers: bytes) -> None:
        if not self._over.is_set():
            kind: Kind = "interrupted" if signal.SIGINT in numbers else "terminated"
            self._leave_soon(kind, kind)

    def _on_silence(self) -> None:
        """The hub is gone, and rank 0 with it."""
        if not self._over.is_set():
            death = End(0, self._job.host, "died", DEATH)
            verdict = judge([death], self._job.world_size)
            assert verdict is not None
            self._on_verdict(verdict, instead=True)

    def _on_verdict(self, verdict: Verdict, instead: bool = False) -> None:
        """The job is over.

        instead: of rank 0, whose part in printing falls to rank 1
        """
        if self._job.local_rank == 0 or (instead and self._job.rank == 1):
            self._print(verdict)
        self._verdict = verdict
        self._over.set()
        if verdict.kind != "done":
            self._leave_soon(verdict.kind, "")

    def _leave_soon(self, kind: Kind, text: str) -> None:
        self._say(kind, text)
        if self._exit_at is None:
            self._exit_at = time.monotonic() + GRACE
            signal.pthread_kill(self._main, signal.SIGTERM)

    def _print(self, verdict: Verdict) -> None:
        for line in verdict.lines:
            print(f"{self._program}: {line}", file=sys.stderr, flush=True)
