"""Where results go: names, and the trial of the place before the work starts."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from hunyuan_fast.cli.errors import CommandError, UsageError


def output_paths(out: Path | None, count: int, suffix: str, *, stem: str) -> tuple[Path, ...]:
    """The names of ``count`` files with this suffix.

    ``out.mp4`` becomes ``out_0.mp4``, ``out_1.mp4``, ... for several. Without ``out`` it is the
    first free ``<stem>-0001.mp4``, ``<stem>-0002.mp4``, ... of the current directory.

    Raises:
        UsageError: ``out`` is a directory or has another suffix.
    """
    if out is None:
        number = 1
        while any(Path().glob(f"{stem}-{number:04d}[._]*")):
            number += 1
        out = Path(f"{stem}-{number:04d}{suffix}")
    with contextlib.suppress(OSError):  # an impossible name, which `tried` will explain
        if out.is_dir():
            raise UsageError(f"-o must be a file name, got the directory {out}; add a name to it")
    if out.suffix.lower() != suffix:
        kinds = {".mp4": "a video", ".png": "a picture", ".toml": "hardware"}
        what = kinds.get(suffix, "attention windows")
        raise UsageError(f"-o must end in {suffix} for {what}, got {str(out)!r}")
    if count == 1:
        return (out,)
    return tuple(out.with_name(f"{out.stem}_{index}{out.suffix}") for index in range(count))


@contextlib.contextmanager
def tried(paths: Sequence[Path], *, overwrite: bool, size: int) -> Iterator[None]:
    """Make sure that files can be written before the work inside the block starts.

    Missing directories are created, and removed again if the block fails and they are empty.

    Args:
        size: bytes that the files may need together.

    Raises:
        CommandError: a file exists and ``overwrite`` is false, is no regular file, or the disk
            has too little room, or the place does not take a file of this name.
    """
    created: list[Path] = []
    try:
        for path in paths:
            try:
                _make_directories(path.parent, created)
                _try_place(path, overwrite)
            except OSError as error:
                raise CommandError(
                    f"{path} cannot be written ({error.strerror}); choose another place with -o"
                ) from error
        free = shutil.disk_usage(paths[0].parent).free
        if free < size:
            raise CommandError(
                f"{paths[0].parent} has {free >> 20} MiB free, but the result may need "
                f"{-(-size >> 20)} MiB; free some space or choose another place with -o"
            )
        yield
    except BaseException:
        for directory in reversed(created):
            with contextlib.suppress(OSError):  # somebody else has put a file there
                directory.rmdir()
        raise


def _make_directories(directory: Path, created: list[Path]) -> None:
    """Create what is missing of ``directory``, outermost first, and add it to ``created``."""
    if directory.exists():
        return
    _make_directories(directory.parent, created)
    directory.mkdir()
    created.append(directory)


def _try_place(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_file():
        raise CommandError(f"{path} is no regular file; choose another name with -o")
    if not overwrite and os.path.lexists(path):
        raise CommandError(f"{path} exists; add --overwrite or choose another name with -o")
    probe = path.parent / f".hunyuan-fast-{secrets.token_hex(6)}.part"
    probe.touch(exist_ok=False)
    probe.unlink()
