"""The life of one process in a job of several: meet the others, work, and leave together.

However one of them ends, by an error, a signal or a kill, all others end within seconds, and the
user reads why once, with its rank.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hunyuan_fast.distributed.broadcast import PeerError
from hunyuan_fast.distributed.hub import Hub
from hunyuan_fast.distributed.job import Job
from hunyuan_fast.distributed.lifeline import Explain, Lifeline
from hunyuan_fast.distributed.verdict import FAILURE, Kind

# For all processes to start; and for one collective, in which the others may load or write.
MEETING = timedelta(minutes=10)
TIMEOUT = timedelta(hours=1)
ADDRESS = "hunyuan_fast/hub"


def run(work: Callable[[], None], job: Job, *, explain: Explain, program: str) -> int:
    """Run the part of this process and return its exit status, 0 when all have done theirs.

    The process ends here when any has not: see :meth:`Lifeline.live`.

    explain: the kind of an exception, and the line that tells it to the user
    program: what printed lines begin with
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is begun yet that has to be undone
        signal.signal(number, signal.SIG_DFL)
    try:
        if job.rank == 0:
            _store().set(ADDRESS, Hub(job.world_size).address)
        lifeline = Lifeline(job, _store().get(ADDRESS).decode(), program)
    except Exception as error:
        _, text = explain(error)
        print(f"{program}: rank {job.rank} of {job.world_size}: {text}", file=sys.stderr)
        return FAILURE

    def explained(error: BaseException) -> tuple[Kind, str]:
        kind, text = explain(error)
        if is_of_another(error):
            return "link", text
        if kind == "failed":
            get_error_handler().record_exception(error)  # for the summary that torchrun prints
        return kind, text

    lifeline.live(work, explained)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def join(device: torch.device, job: Job) -> None:
    """Make the default process group: NCCL between GPUs, gloo between CPUs.

    device: of this process; a GPU becomes the current one
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("hunyuan_fast/group", _store()),
        rank=job.rank,
        world_size=job.world_size,
        timeout=TIMEOUT,
    )


@functools.cache
def _store() -> dist.Store:
    """The store of the job, through which its processes find each other."""
    store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
    return store


def is_of_another(error: BaseException) -> bool:
    """Whether it only tells that another process did not do its part."""
    if isinstance(error, (PeerError, dist.DistBackendError, dist.DistNetworkError)):
        return True
    lost: Any = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in lost)
