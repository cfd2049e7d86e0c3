"""A machine whose clock only moves when somebody works, and results made of nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from benchmarks.kit.machine import Machine, Source
from benchmarks.kit.record import VERSION, Alternation, Measurement, Result, Timing
from benchmarks.kit.statistics import Spread


@dataclass
class FakeMachine:
    """``slowdown(time)`` tells how many times as long work takes at a moment."""

    slowdown: Callable[[float], float] = lambda time: 1.0
    time: float = 0.0
    log: list[str] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        """A call that takes so long when nothing slows the machine."""

        def run() -> None:
            self.log.append(name)
            self.time += seconds * self.slowdown(self.time)

        return run


def constant(value: float) -> Spread:
    return Spread(value, value, value)


def timing(name: str, kind: str = "ours", ms: float = 2.0, **changes: object) -> Timing:
    made = Timing(
        name=name,
        kind=kind,
        answers=False,
        ms=constant(ms),
        rounds=5,
        calls=1,
        speedup=constant(4.0 / ms),
        of_floor=constant(1.0 / ms),
        peak_mib=None,
        difference=0.0,
    )
    return replace(made, **changes)


def measurement(**changes: object) -> Measurement:
    made = Measurement(
        case="256p-33f",
        function="scale",
        dtype="float32",
        shape={"L": 8},
        what="forward",
        num_bytes=2_000_000,
        num_flops=0,
        copy_gb_per_s=2.0,
        matmul_tflop_per_s=None,
        floor_ms=constant(1.0),
        bound="memory",
        best_peer="eager",
        timings=[
            timing("cpu_impl", answers=True),
            timing("reference", ms=8.0),
            timing("eager", "peer", 4.0),
        ],
        declined={"triton_impl": "Triton finds no GPU"},
    )
    return replace(made, **changes)


def result(**changes: object) -> Result:
    machine = Machine(
        device="A Processor (R)",
        arch="cpu",
        driver=None,
        cpu="A Processor (R)",
        cpu_capability="AVX512",
        threads=2,
        cores=2,
        torch="2.13.0",
        cuda=None,
        triton=None,
        python="3.11.2",
        system="Linux x86_64",
    )
    source = Source(
        commit="0123456789abcdef",
        clean=True,
        date="2026-01-01T00:00:00Z",
        command="python -m benchmarks scale",
    )
    alternation = Alternation(
        case="256p-33f",
        dtype="float32",
        name="cpu_impl",
        kind="ours",
        companion="gelu",
        ratio=constant(1.0),
    )
    made = Result(
        version=VERSION,
        op="scale",
        quick=False,
        tests="passed",
        neighbours=0.0,
        machine=machine,
        source=source,
        measurements=[measurement()],
        alternations=[alternation],
    )
    return replace(made, **changes)
