"""Where the processes of a job say how they end, and hear how the job does: a thread of rank 0."""

from __future__ import annotations

import hmac
import secrets
import selectors
import threading
import time
from typing import Any, cast

from hunyuan_fast.distributed.verdict import DEATH, STATUS, End, Kind, Verdict, judge
from hunyuan_fast.distributed.wire import Wire, listener

# From the first bad news to the verdict: so long the others may have news of their own.
WINDOW = 0.5
TICK = 0.1


class Hub:
    """Listens until all processes are done, or one is not well; then tells all of them.

    A process that is gone without a word is noticed by the end of its connection.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._token = secrets.token_hex(16)
        self._listener = listener()
        self.address = f"{self._listener.getsockname()[1]} {self._token}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._members: dict[Wire, tuple[int, str]] = {}
        self._ends: dict[int, End] = {}
        self._judging_at: float | None = None
        self._verdict: Verdict | None = None
        threading.Thread(target=self._serve, name="hub", daemon=True).start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(TICK):
                if key.fileobj is self._listener:
                    self._welcome()
                else:
                    self._hear(cast(Wire, key.fileobj))
            if self._verdict is None:
                self._judge()

    def _welcome(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # who has knocked is gone again
            return
        connection.setblocking(True)
        self._selector.register(Wire(connection), selectors.EVENT_READ)

    def _hear(self, wire: Wire) -> None:
        messages = wire.receive()
        for message in messages or ():
            if wire not in self._members:
                if not self._introduce(wire, message):
                    messages = None
                    break
            else:
                self._note(wire, message.get("kind"), str(message.get("text", "")))
        if messages is None:
            if wire in self._members:
                self._note(wire, "died", DEATH)
            self._members.pop(wire, None)
            self._selector.unregister(wire)
            wire.close()

    def _introduce(self, wire: Wire, message: dict[str, Any]) -> bool:
        """Whether it is a process of this job."""
        rank, token = message.get("rank"), str(message.get("token"))
        if not hmac.compare_digest(token, self._token) or not isinstance(rank, int):
            return False
        self._members[wire] = rank, str(message.get("host"))
        if self._verdict is not None:
            _tell(wire, self._verdict)
        return True

    def _note(self, wire: Wire, kind: Any, text: str) -> None:
        """Keep the first word of each process; but nobody who has died is done."""
        rank, host = self._members[wire]
        before = self._ends.get(rank)
        if kind in STATUS and (before is None or (before.kind == "done" and kind == "died")):
            self._ends[rank] = End(rank, host, cast(Kind, kind), text)

    def _judge(self) -> None:
        verdict = judge(self._ends.values(), self._world_size)
        if verdict is None:
            return
        now = time.monotonic()
        if self._judging_at is None:
            self._judging_at = now + WINDOW
        if now >= self._judging_at or len(self._ends) == self._world_size:
            self._verdict = verdict
            # rank 0 last: it may end at once, and the hub with it
            for wire, _ in sorted(self._members.items(), key=lambda item: -item[1][0]):
                _tell(wire, verdict)


def _tell(wire: Wire, verdict: Verdict) -> None:
    wire.send(kind=verdict.kind, lines=list(verdict.lines))
