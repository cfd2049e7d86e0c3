"""Several processes share one GPU: most tests side by side, those that want all of it alone.

Files of the system's temporary folder are the locks, so processes that know nothing of each other
take turns too; a lock ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

# What a process keeps for its next test without being asked to give it back.
_LITTLE = 2**30


def default_folder() -> Path:
    """Where the locks lie: one pair for each user of the machine."""
    return Path(tempfile.gettempdir()) / f"hunyuan-fast-gpu-{os.getuid()}"


@contextmanager
def turn(*, alone: bool, folder: Path | None = None) -> Iterator[None]:
    """For as long as the context lasts this process is one of those on the GPU, or the only one.

    Whoever waits to be alone keeps newcomers out, so that its turn comes.
    """
    folder = folder or default_folder()
    folder.mkdir(exist_ok=True)
    with ExitStack() as held:
        with _locked(folder / "door", fcntl.LOCK_EX):
            held.enter_context(_locked(folder / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield  # closing the file unlocks it


@pytest.fixture(autouse=True)
def turn_on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked ``gpu`` run side by side in several processes; ``whole_gpu`` ones alone."""
    marker = request.node.get_closest_marker
    if marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    alone = marker("whole_gpu") is not None
    with turn(alone=alone):
        yield
        if alone or torch.cuda.memory_reserved() > _LITTLE:
            torch.cuda.empty_cache()
