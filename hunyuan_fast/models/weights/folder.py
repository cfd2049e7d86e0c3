"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hunyuan_fast.models.weights.errors import CheckpointError


@contextmanager
def atomic_folder(path: str | Path, *, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A hidden folder beside `path` to write into; it takes the name `path` when the block ends.

    Its files are made durable first. On any exception, Ctrl-C included, it is removed and `path`
    stays as it was. A folder that already has the name is replaced only where it is empty or
    `ours(folder)` says so.
    Raises CheckpointError when `path` is a file or a foreign folder, OSError when the place cannot
    be written.
    """
    target = Path(path).expanduser().absolute()
    _refuse_foreign(target, ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Short whatever the final name is: it must not be the one that is too long.
    hidden = target.parent / f".hunyuan-fast-{secrets.token_hex(6)}.part"
    hidden.mkdir()
    try:
        yield hidden
        for entry in (*hidden.rglob("*"), hidden):
            _sync(entry)
        _refuse_foreign(target, ours)
        _take_name(hidden, target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _sync(target.parent)


def _refuse_foreign(target: Path, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: a file has this name; choose another folder")
    entries = sorted(entry.name for entry in target.iterdir())
    if entries and not ours(target):
        raise CheckpointError(
            f"{target}: not empty and not a model of this package (it holds {entries[0]}); "
            "nothing was written, choose another folder"
        )


def _take_name(hidden: Path, target: Path) -> None:
    """Rename `hidden` to `target`; what was there is restored if that fails, else removed."""
    if not target.is_dir():
        hidden.rename(target)
        return
    previous = hidden.with_suffix(".old")
    target.rename(previous)
    try:
        hidden.rename(target)
    except BaseException:
        previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable (Windows cannot open folders)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
