"""A link between processes of one machine that is as slow as one between machines.

A message is there when the real one is, and not before the link would have brought it: after the
messages before it, a latency, and its bytes over the bandwidth. What is measured is what a program
waits for it, and when.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from hunyuan_fast.distributed import rotation


@dataclass
class Link:
    """A link in one direction, and what came over it.

    latency: seconds    bandwidth: bytes per second
    transfers: from when to when each message was under way    waits: and was waited for
    """

    latency: float
    bandwidth: float
    transfers: list[tuple[float, float]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def book(self, size: int) -> float:
        """When a message of so many bytes will be there."""
        now = time.perf_counter()
        start = max(now, self.transfers[-1][1] if self.transfers else now)
        end = start + self.latency + size / self.bandwidth
        self.transfers.append((start, end))
        return end

    @property
    def exposed(self) -> float:
        """Seconds of waiting."""
        return sum(end - start for start, end in self.waits)


@contextmanager
def slow_link(latency: float, bandwidth: float) -> Iterator[Link]:
    """What this process receives from its ring comes over a slow link inside the block."""
    link = Link(latency, bandwidth)
    real = rotation.Transfer
    start, finish = real.__init__, real.finish

    def slow_start(self: rotation.Transfer, outgoing: Tensor, incoming: Tensor, *rest: object):
        start(self, outgoing, incoming, *rest)
        self.there = link.book(incoming.numel() * incoming.element_size())

    def slow_finish(self: rotation.Transfer) -> None:
        began = time.perf_counter()
        finish(self)
        time.sleep(max(0.0, self.there - time.perf_counter()))
        link.waits.append((began, time.perf_counter()))

    real.__init__, real.finish = slow_start, slow_finish
    try:
        yield link
    finally:
        real.__init__, real.finish = start, finish
