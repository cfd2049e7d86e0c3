"""One command over several processes: its options, who speaks, and how it all ends."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from hunyuan_fast.cli.errors import UsageError
from hunyuan_fast.cli.parsing import Int, OptionalInt
from hunyuan_fast.cli.record import quote
from hunyuan_fast.distributed.job import Job

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from hunyuan_fast.distributed.mesh import Layout
    from hunyuan_fast.distributed.verdict import Kind

PROGRAM = "hunyuan-fast"


@dataclass(frozen=True)
class ParallelOptions:
    """How many processes share what; torchrun starts dp x cp x tp of them."""

    dp: Int = 1
    """Groups of processes with videos of their own."""
    cp: Int = 1
    """Processes that share the tokens of one video."""
    ulysses: OptionalInt = None
    """How many of those exchange heads for tokens, the others form a ring. Default: 1."""
    tp: Int = 1
    """Processes that share each weight."""
    sequence_parallel: Annotated[bool, arg(help_behavior_hint="")] = True
    """Keep all tokens in each of those processes between the shared weights."""
    zero: Annotated[Int, arg(metavar="{0,1,2,3}")] = 0
    """Keep once in dp x cp processes: 1 the optimiser's state, 2 gradients too, 3 weights too."""
    offload: bool = False
    """With --zero 3: weights wait in host memory."""


def read_layout(options: ParallelOptions, command: str) -> Layout:
    """The layout that the options ask for, checked against the processes that are there.

    command: as the user types it behind the program's name, "generate" or "train nano"

    Raises:
        UsageError: no job can have it, or this one has another number of processes.
    """
    from hunyuan_fast.distributed.mesh import Layout

    try:
        layout = Layout(**{field.name: getattr(options, field.name) for field in fields(options)})
        job = Job.of_environment()
        if job is not None:
            layout.check_world(job.world_size)
    except ValueError as error:
        raise UsageError(in_flags(str(error))) from error
    if job is None and not layout.is_single:
        words = " ".join(quote(word) for word in sys.argv[1:] or command.split())
        raise UsageError(
            f"{named(layout)} is the work of {layout.world_size} processes, and this is one; start "
            f"them with: torchrun --nproc-per-node {layout.world_size} -m hunyuan_fast {words}"
        )
    return layout


def check_layout(layout: Layout, num_heads: int) -> None:
    """Refuse a layout that does not fit a model of so many heads.

    Raises:
        UsageError: it does not.
    """
    try:
        layout.check_heads(num_heads)
    except ValueError as error:
        raise UsageError(in_flags(str(error))) from error


def check_videos(layout: Layout, num_heads: int, num_videos: int) -> None:
    """Refuse a layout that cannot make so many videos by a model of so many heads.

    Raises:
        UsageError: it cannot.
    """
    from hunyuan_fast.pipelines.parallel import check_layout as check

    try:
        check(layout, num_heads)
    except ValueError as error:
        raise UsageError(in_flags(str(error))) from error
    if num_videos < layout.dp:
        raise UsageError(
            f"--dp {layout.dp} deals out videos, and there is {num_videos}; make at least "
            f"{layout.dp} with --num-videos, or share each of them with --cp"
        )


def check_attention(layout: Layout, given: str) -> None:
    """Refuse a layout with a ring for attention that only whole sequences have.

    given: the option that asks for it

    Raises:
        UsageError: there is a ring.
    """
    if layout.ring > 1:
        raise UsageError(
            f"{given} takes --ulysses {layout.cp}, as many processes as --cp, got "
            f"{layout.ulysses or 1}: who exchanges heads has whole sequences, a ring has not"
        )


def in_flags(message: str) -> str:
    """An error of a layout in the words of the command line."""
    head, must, rest = message.partition(" must ")
    head = re.sub(r"\b(dp|cp|ulysses|tp|zero|offload)\b", r"--\1", head)
    return head + must + rest


def named(layout: Layout) -> str:
    """The options that ask for a layout; no word for what one process does."""
    words = []
    for field in fields(ParallelOptions):
        value = getattr(layout, field.name)
        if value != field.default:
            name = field.name.replace("_", "-")
            words += [f"--no-{name}" if value is False else f"--{name}"]
            words += [] if isinstance(value, bool) else [str(value)]
    return " ".join(words)


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any."""
    job = Job.of_environment()
    if job is not None:
        from hunyuan_fast.distributed.launch import join as join_job

        join_job(device, job)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank_of_process() == 0


def rank_of_process() -> int:
    """Its number in the job."""
    job = Job.of_environment()
    return 0 if job is None else job.rank


def place_of_process(device: str | None) -> str | None:
    """The device of this process in the words of ``--device``: each has a GPU of its own.

    Raises:
        UsageError: one GPU is named for several processes.
    """
    job = Job.of_environment()
    if job is None or device == "cpu":
        return device
    import torch

    if device is None and not torch.cuda.is_available():
        return "cpu"
    if device not in (None, "cuda"):
        raise UsageError(
            f"--device must be cpu or cuda under torchrun, got {device!r}; each process takes the "
            "GPU of its own number, and CUDA_VISIBLE_DEVICES chooses which are counted"
        )
    return f"cuda:{job.local_rank}"


def console_of_process() -> Console:
    """The console on stderr for bars and stages; that of the others is silent."""
    from rich.console import Console as Silent

    from hunyuan_fast.cli.stages import console

    return console(stderr=True) if is_first() else Silent(quiet=True)


def run_in_job(
    work: Callable[[], None], job: Job, describe: Callable[[BaseException], str], debug: bool
) -> int:
    """Run the part of this process and return its exit status; the first process alone speaks."""
    from hunyuan_fast.distributed.launch import run

    def explain(error: BaseException) -> tuple[Kind, str]:
        if debug:
            traceback.print_exception(error)
        return "usage" if isinstance(error, UsageError) else "failed", describe(error)

    with Path(os.devnull).open("w") as nowhere, contextlib.ExitStack() as stack:
        if job.rank:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return run(work, job, explain=explain, program=PROGRAM)
