"""The clock of a GPU, on made-up events and on a real device."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.kit.clock import CudaClock, HostClock, clock_for
from tests.kit import gpu


@pytest.fixture
def events(monkeypatch):
    """A device in name only: what is recorded when, and a tick per event."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    properties = SimpleNamespace(L2_cache_size=1024, total_memory=16 * 4096)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return log


def test_the_cache_is_flushed_before_the_first_event(events):
    clock = CudaClock(torch.device("cpu"))
    clock.flush.fill_(1)

    def run() -> None:
        assert not clock.flush.any()
        clock.flush.fill_(1)
        events.append("call")

    assert clock.sample(run, calls=3) == pytest.approx(2e-3)
    assert events == ["event", "call", "event", "wait"] * 3
    assert clock.flush.numel() == 4096 and clock.cache_bytes == 1024


def test_the_cpu_has_wall_time_and_knows_no_peak():
    clock = clock_for(torch.device("cpu"), cache_bytes=7)
    assert isinstance(clock, HostClock) and clock.cache_bytes == 7
    assert clock.sample(lambda: None, calls=2) >= 0
    assert clock.peak_bytes(lambda: None) is None


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_a_real_device_is_timed_and_its_memory_counted():
    clock = clock_for(torch.device("cuda"), cache_bytes=0)
    x = torch.ones(2**24, device="cuda")
    clock.warm_up()
    short = min(clock.sample(lambda: x[: 2**18] + 1, calls=1) for _ in range(5))
    long = min(clock.sample(lambda: x + 1, calls=1) for _ in range(5))
    assert 0 < short < long < gpu.size(0.1, 60.0)
    assert clock.peak_bytes(lambda: x + 1) == pytest.approx(2**26, rel=0.1)
