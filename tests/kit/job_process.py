"""One process of a job without torch, which starts at once: ``python job_process.py RANK ...``.

Each is told what it does. It prints "ready" before, and "cleaned" when it leaves its work.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from hunyuan_fast.distributed import lifeline
from hunyuan_fast.distributed.hub import Hub
from hunyuan_fast.distributed.job import Job
from hunyuan_fast.distributed.lifeline import Lifeline
from hunyuan_fast.distributed.verdict import Kind

lifeline.GRACE = 1.0  # the tests wait for it


def hang() -> None:
    """As in a collective of native code: signals do not end the wait."""
    mutex = ctypes.create_string_buffer(128)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


def work() -> None:
    """Python code that takes long."""
    while True:
        time.sleep(0.05)


def fail() -> NoReturn:
    raise ValueError("broken")


def misuse() -> NoReturn:
    raise LookupError("no such flag")


def lose() -> NoReturn:
    raise ConnectionError("peer is gone")


DEEDS = {
    "done": lambda: None,
    "slow": lambda: time.sleep(1.0),
    "hang": hang,
    "work": work,
    "fail": fail,
    "misuse": misuse,
    "lose": lose,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def explain(error: BaseException) -> tuple[Kind, str]:
    kinds: dict[type, Kind] = {LookupError: "usage", ConnectionError: "link"}
    return kinds.get(type(error), "failed"), f"error: {error}"


def main(rank: int, world_size: int, deed: str, folder: Path) -> None:
    place = folder / "address"
    if rank == 0:
        partial = folder / "partial"
        partial.write_text(Hub(world_size).address)
        partial.rename(place)
    while not place.exists():
        time.sleep(0.01)
    launcher = int(os.environ["LAUNCHER"]) if "LAUNCHER" in os.environ else None
    job = Job(
        rank=rank, local_rank=rank, world_size=world_size, host="127.0.0.1", launcher=launcher
    )

    def part() -> None:
        try:
            print("ready", flush=True)
            time.sleep(0.2)  # all others are there as well
            DEEDS[deed]()
        finally:
            print("cleaned", flush=True)

    Lifeline(job, place.read_text(), "job").live(part, explain)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
