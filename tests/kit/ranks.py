"""Functions run by several processes that talk to each other through gloo.

The processes are started once for all tests, because to start one costs seconds: each function is
run by the first so many of them, in a world of its own. When one fails or hangs, all are ended, and
the next call starts new ones.
"""

import importlib
import io
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST_RANKS = 4
TIMEOUT = 180.0
# What most functions import: one process does it, and the others are copies of that one.
PRELOADED = (
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "hunyuan_fast.models",
    "hunyuan_fast.trainer.loop",
    "hunyuan_fast.pipelines",
)


class RankFailed(AssertionError):
    """What a rank raised, with its traceback."""


class RankPool:
    """Processes that wait for functions."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
    ) -> list[Any]:
        """The results of ``function(*args)`` on ranks 0 to world - 1, in this order.

        The function has to be at the top level of its module; arguments and results are what
        ``torch.save`` takes. Inside it the default group is one of ``world`` processes.
        """
        if not 1 <= world <= MOST_RANKS:
            raise ValueError(f"world must be 1 to {MOST_RANKS}, got {world}")
        self._start(world)
        name = f"{function.__module__}:{function.__qualname__}"
        with tempfile.TemporaryDirectory() as folder:
            job = _packed((name, args, world, f"{folder}/store", timeout))
            for pipe in self._pipes[:world]:
                pipe.send_bytes(job)
            try:
                return self._collect(world, name, timeout)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        for rank in range(len(self._workers), count):
            ours, theirs = context.Pipe()
            root = str(Path(__file__).parents[2])
            worker = context.Process(target=_serve, args=(rank, theirs, root), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def _collect(self, world: int, name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {self._pipes[rank]: rank for rank in range(world)}
        end = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                missing = sorted(waiting.values())
                raise RankFailed(f"{name}: no answer of ranks {missing} within {timeout:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failed, result = _unpacked(pipe.recv_bytes())
                except EOFError:
                    raise RankFailed(f"{name}: rank {rank} of {world} died") from None
                if failed:
                    raise RankFailed(f"{name}: rank {rank} of {world} failed\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(world)]


@contextmanager
def rank_pool() -> Iterator[RankPool]:
    """Processes that end with the block."""
    pool = RankPool()
    try:
        yield pool
    finally:
        pool.close()


def _serve(rank: int, pipe: Connection, root: str) -> None:
    """What a process does until its pipe is closed."""
    if root not in sys.path:
        sys.path.insert(0, root)
    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            pipe.send_bytes(_packed(_answer(rank, *_unpacked(pipe.recv_bytes()))))


def _answer(
    rank: int, name: str, args: tuple[Any, ...], world: int, store: str, timeout: float
) -> tuple[bool, Any]:
    """Whether it failed, and the result or the traceback."""
    module, _, function = name.partition(":")
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        try:
            dist.barrier()  # who fails at once must not leave before all have met
            torch.manual_seed(rank)
            return False, getattr(importlib.import_module(module), function)(*args)
        finally:
            dist.destroy_process_group()
            _forget_meshes()
    except Exception:
        return True, traceback.format_exc()


def _forget_meshes() -> None:
    """Let DTensor find its meshes anew: it takes one of an earlier world for an equal one."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    # from a process of our own
    return torch.load(io.BytesIO(data), weights_only=False)
