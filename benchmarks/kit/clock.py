"""Seconds of a call: by the host's clock, or by the events of a CUDA device."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

Run = Callable[[], object]

MIB = 2**20
_WARM_UP = 4096  # rows and columns of the matrices that bring a GPU to its clock rate


class Clock(Protocol):
    """Times a call. ``cache_bytes`` is the size of the last cache before memory."""

    cache_bytes: int
    min_sample_seconds: float
    flushes: bool

    def sample(self, run: Run, calls: int) -> float:
        """Seconds per call over ``calls`` calls."""
        ...

    def warm_up(self) -> None:
        """Bring the device to the clock rate that it holds under load."""
        ...

    def peak_bytes(self, run: Run) -> int | None:
        """The most memory that a call has at a time beyond its inputs; None when not known."""
        ...


class HostClock:
    """Wall time on the CPU, many calls in a row when one is short."""

    flushes = False

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        cache_bytes: int = 32 * MIB,
        min_sample_seconds: float = 0.01,
    ) -> None:
        self.now = now
        self.cache_bytes = cache_bytes
        self.min_sample_seconds = min_sample_seconds

    def sample(self, run: Run, calls: int) -> float:
        start = self.now()
        for _ in range(calls):
            run()
        return (self.now() - start) / calls

    def warm_up(self) -> None:
        x = torch.ones(512, 512)
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            x @ x

    def peak_bytes(self, run: Run) -> int | None:
        return None


class CudaClock:
    """Time between two events around each call, after the cache was overwritten.

    The overwriting also gives the host time to queue the call, so that a launch is not timed.
    """

    flushes = True
    min_sample_seconds = 0.0

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.cache_bytes = properties.L2_cache_size
        flush_bytes = min(1024 * MIB, properties.total_memory // 16)
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def sample(self, run: Run, calls: int) -> float:
        milliseconds = 0.0
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            milliseconds += start.elapsed_time(end)
        return milliseconds / calls / 1e3

    def warm_up(self) -> None:
        x = torch.ones(_WARM_UP, _WARM_UP, dtype=torch.bfloat16, device=self.device)
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            x @ x
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, run: Run) -> int | None:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def clock_for(device: torch.device, cache_bytes: int) -> Clock:
    """The clock of a device; ``cache_bytes`` is the last-level cache of the CPU."""
    if device.type == "cuda":
        return CudaClock(device)
    return HostClock(cache_bytes=cache_bytes)
