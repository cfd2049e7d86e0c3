"""The way in: choose the command, and turn whatever goes wrong into one line and a status."""

import errno
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, TextIO

from hunyuan_fast.cli import registry
from hunyuan_fast.cli.errors import (
    FAILURE,
    INTERRUPTED,
    TERMINATED,
    USAGE,
    CommandError,
    UsageError,
)
from hunyuan_fast.distributed.job import Job

_FREE_SPACE = "; free some space or choose another place with -o"
_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FREE_SPACE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 success; 1 the command failed; 2 the command line is wrong; 130 Ctrl-C; 143 terminated.
    Errors are one line on stderr, with the traceback above it when ``--debug`` is given. Under
    ``torchrun`` all processes have the status of the job, and one speaks for all.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        job = Job.of_environment() if argv is None else None
        if job is not None:
            from hunyuan_fast.cli.parallel import run_in_job

            return run_in_job(lambda: _run(words), job, describe, debug)
        if argv is None:  # the process is ours
            signal.signal(signal.SIGTERM, _terminated)
        _run(words)
    except UsageError as error:
        return _report(error, USAGE, debug)
    except KeyboardInterrupt as error:
        return _report(error, INTERRUPTED, debug)
    except _Terminated as error:
        return _report(error, TERMINATED, debug)
    except Exception as error:
        return _report(error, FAILURE, debug)
    return 0


def _run(words: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _run_command(words)


def _run_command(words: list[str]) -> None:
    names = registry.command_names()
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(names))
    elif words[0] in ("-V", "--version"):
        from hunyuan_fast import __version__

        print(f"hunyuan-fast {__version__}")
    elif words[0] in names:
        if Job.of_environment() is not None and not registry.takes_several_processes(words[0]):
            raise UsageError(f"{words[0]} is the work of one process; start it without torchrun")
        try:
            registry.load(words[0])(words[1:])
        except SystemExit as stop:  # --help
            assert not stop.code
    else:
        raise UsageError(f"no command {words[0]!r}; expected one of {', '.join(names)}")


def _overview(names: Sequence[str]) -> str:
    width = max(map(len, names)) + 2
    lines = ["usage: hunyuan-fast COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<{width}}{registry.summary(name)}" for name in names]
    lines += ["", "hunyuan-fast COMMAND --help tells the options of a command."]
    return "\n".join(lines)


def _report(error: BaseException, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"hunyuan-fast: {describe(error)}", file=sys.stderr)
    return status


def describe(error: BaseException) -> str:
    """An exception in one line, for the user."""
    said = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {said or 'no unfinished file is left'}"
    if isinstance(error, _Terminated):
        return "terminated; no unfinished file is left"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"error: out of memory ({said or 'host memory'}); ask for fewer frames, a smaller "
            "size or fewer videos"
        )
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename
        place = f": {name}" if name is not None else ""
        return f"error: {error.strerror}{place}{_ADVICE.get(error.errno or 0, '')}"
    expected = (UsageError, CommandError, OSError, ValueError, RuntimeError, ArithmeticError)
    if isinstance(error, (*expected, ImportError, TypeError)) and said:
        return f"error: {said}"
    return f"error: internal error, {type(error).__name__}: {said}; --debug shows where"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning for the user in one line; those for programmers are left out."""
    job = Job.of_environment()
    if issubclass(category, UserWarning) and (job is None or job.rank == 0):
        print(f"hunyuan-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that half-written files are removed."""


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
