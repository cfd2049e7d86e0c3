"""What a process sends, counted where it is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_counting: list[Traffic] = []


@dataclass
class Traffic:
    """Bytes and messages that this process has sent, by kind of communication.

    Of a collective that is counted which a ring of P processes sends: an all-gather each process's
    own part P - 1 times, a reduce-scatter P - 1 of P parts, an all-reduce both, an all-to-all what
    is for others. A call is one message, point to point as well.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process sends inside the block, also in backward passes that run there."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def sent(kind: str, count: int) -> None:
    """Note a message of so many bytes."""
    for traffic in _counting:
        traffic.bytes[kind] += count
        traffic.messages[kind] += 1
