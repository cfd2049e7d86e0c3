"""What stands in for ``torch.cuda``: one device like an H200, events, streams and graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from tests.kit.rehearsal.device import State, waits

NAME, CAPABILITY = "a rehearsal's device", (9, 0)
MEMORY = 2**26  # little: some of it is written over before every call that is timed
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=MEMORY,
    multi_processor_count=132,
    L2_cache_size=2**16,  # what is flushed before every call is as large
    warp_size=32,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
)


class Event:
    """Times of the host."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._timing, self._at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        if State.tape is not None:
            raise RuntimeError("CUDA error: an event that times is no part of a graph")
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        waits("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing) or None in (self._at, end._at):
            raise ValueError("Both events must be recorded, and created with enable_timing=True")
        return max(1e-6, 1e3 * (end._at - self._at))

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        """Everything is done in order here."""


class Stream:
    """The only one, whatever it is called."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, stream: Stream) -> None:
        """Everything is done in order here."""

    def wait_event(self, event: Event) -> None:
        """Everything is done in order here."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        waits("Stream.synchronize")


class CUDAGraph:
    """The operators and kernels of a block, to be called again on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.tape: list[Callable[[], None]] | None = None

    def replay(self) -> None:
        if self.tape is None:
            raise RuntimeError("replay before the capture has ended")
        for step in self.tape:
            step()

    def reset(self) -> None:
        self.tape = None


class Capture:
    """``torch.cuda.graph``."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any):
        self._graph = cuda_graph

    def __enter__(self) -> None:
        if State.tape is not None:
            raise RuntimeError("a capture within a capture")
        State.tape = []

    def __exit__(self, *_: object) -> None:
        self._graph.tape, State.tape = State.tape, None


def _set_sync_debug_mode(mode: str | int) -> None:
    State.sync_debug = {0: "default", 1: "warn", 2: "error"}.get(mode, mode)


def _reset_peak(device: Any = None) -> None:
    State.peak = State.allocated


def install(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Patch torch by ``set_attribute(owner, name, value)``."""
    stands_in = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: NAME,
        "synchronize": lambda device=None: waits("synchronize"),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: State.tape is not None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": CUDAGraph,
        "graph": Capture,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (MEMORY - State.allocated, MEMORY),
        "memory_allocated": lambda device=None: State.allocated,
        "memory_reserved": lambda device=None: State.allocated,
        "max_memory_allocated": lambda device=None: State.peak,
        "max_memory_reserved": lambda device=None: State.peak,
        "reset_peak_memory_stats": _reset_peak,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed_all": lambda seed: None,
    }
    for name, value in stands_in.items():
        assert hasattr(torch.cuda, name), name
        set_attribute(torch.cuda, name, value)
    set_attribute(torch.version, "cuda", "13.0")
    set_attribute(torch.backends.cudnn, "version", lambda: 91900)
    set_attribute(torch.backends.cudnn, "is_available", lambda: True)
