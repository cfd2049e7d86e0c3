"""The most memory that a call on the CPU has at a time, read in a process of its own.

A process hands memory back when it likes, so what one contender has used hides in what is already
there for the next. Here each has a fresh process: weights and inputs are made, what was freed on
the way is given back, the system's record of the highest resident size is set to the present, and
one call is made, the first of that process. What the record has grown by is the peak.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kit.case import Case
from benchmarks.kit.discover import ROOT, load

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(op: str, case: Case, contender: str, *, quick: bool, seed: int) -> int | None:
    """Bytes beyond weights and inputs of one call forward; None where the system does not tell.

    Raises RuntimeError with what the process said when it fails.
    """
    if not _RESET.exists():
        return None
    request = {
        "op": op,
        "key": _key(case),
        "contender": contender,
        "quick": quick,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kit.fresh", json.dumps(request)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the peak of {contender} was not read: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def growth(run: Callable[[], object]) -> int:
    """Bytes by which the resident size of this process grows, at most, during ``run``."""
    gc.collect()
    # What glibc keeps of freed memory would be used again without being seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _RESET.write_text("5")
    before = _kilobytes("VmRSS")
    run()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _key(case: Case) -> list[str]:
    return [case.function, case.name, case.dtype_name]


def _main(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    device = torch.device("cpu")
    cases = load(asked["op"]).cases(device, quick=asked["quick"])
    case = next(each for each in cases if _key(each) == asked["key"])
    entrants = (*case.ours, *case.peers)
    entrant = next(each for each in entrants if each.name == asked["contender"])
    inputs = case.inputs(torch.Generator(device).manual_seed(asked["seed"]))
    call = entrant.build()
    with torch.no_grad(), entrant.context():
        print(growth(lambda: call(*inputs)))


if __name__ == "__main__":
    _main(sys.argv[1])
