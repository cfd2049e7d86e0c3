"""Which ops and wholes have a benchmark: the files ``bench_<name>.py``, and nothing else."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # Bad usage is told before torch is loaded.
    import torch

    from benchmarks.kit.case import Case

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
# Runs that are no evidence: quick ones, and those that skipped the tests.
SCRATCH = ROOT / "runs" / "benchmarks"
# Wholes are made of several ops and have no room; these of their tests must pass first.
WHOLES = {
    "dit_blocks": (
        "tests/models/test_dit.py",
        "tests/models/test_dit_checkpoint.py",
        "tests/models/test_dit_memory.py",
    ),
    "transformer": (
        "tests/models/test_dit.py",
        "tests/models/test_dit_checkpoint.py",
        "tests/samplers/test_euler.py",
    ),
    "vae": (
        "tests/models/test_vae.py",
        "tests/models/test_vae_checkpoint.py",
    ),
}


class Benchmark(Protocol):
    """What ``bench_<name>.py`` defines.

    It may also have ``more(path, quick=...)``, which measures what is no case, writes it beside the
    result at ``path``, and returns what it wrote.
    """

    def cases(self, device: torch.device, *, quick: bool) -> list[Case]:
        """What to measure on a device; a small selection when ``quick``."""
        ...


def ops(folder: Path = BENCHMARKS) -> tuple[str, ...]:
    """The names of all ops and wholes with a benchmark, in alphabetical order."""
    return tuple(sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")))


def load(op: str) -> Benchmark:
    """The benchmark of an op or a whole."""
    return import_module(f"benchmarks.bench_{op}")  # type: ignore[return-value]
