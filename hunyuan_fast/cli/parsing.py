"""From words to a frozen dataclass, through tyro, with errors of one line."""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from hunyuan_fast.cli.errors import UsageError

T = TypeVar("T")


def _optional(read: Callable[[str], Any], metavar: str, expected: str) -> Any:
    """How tyro reads one word that stands for a value, where leaving it out means None."""

    def from_words(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ValueError:
            raise ValueError(f"expected {expected}, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=from_words,
        is_instance=lambda value: value is None or isinstance(value, (int, float, str, Path)),
        str_from_instance=lambda value: [str(value)],
    )


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError
    return value


# The help of an optional word says itself what leaving it out means.
_SILENT = tyro.conf.arg(help_behavior_hint="")

OptionalInt = Annotated[int | None, _optional(int, "INT", "a whole number"), _SILENT]
OptionalFloat = Annotated[float | None, _optional(_finite, "FLOAT", "a finite number"), _SILENT]
OptionalText = Annotated[str | None, _optional(str, "TEXT", "a text"), _SILENT]
OptionalInput = Annotated[Path | None, _optional(Path, "FILE", "a file name"), _SILENT]
OptionalFile = Annotated[
    Path | None,
    _optional(Path, "FILE", "a file name"),
    tyro.conf.arg(aliases=("-o",), help_behavior_hint=""),
]
Int = Annotated[int, _optional(int, "INT", "a whole number")]
Float = Annotated[float, _optional(_finite, "FLOAT", "a finite number")]


def parse(options: type[T], argv: Sequence[str], command: str, description: str = "") -> T:
    """Read ``argv`` into the dataclass ``options``.

    Raises:
        UsageError: with one line that says what is wrong.
        SystemExit: after ``--help``.
    """
    prog = f"hunyuan-fast {command}"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                options,
                args=list(argv),
                prog=prog,
                description=description or None,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_one_line(complaint.getvalue())} (see {prog} --help)") from None


def _one_line(box: str) -> str:
    """What tyro's framed message says in its first section, with the suggestion if there is one."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    said = " ".join(lines[: lines.index("")] if "" in lines else lines)
    said = said.removeprefix("Error parsing ")
    if "Perhaps you meant:" in lines:
        meant = lines[lines.index("Perhaps you meant:") + 1].split()[0]
        said += f"; perhaps you meant {meant}"
    return said
