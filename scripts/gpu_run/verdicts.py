"""What the end of a step means."""

from __future__ import annotations

import re
from enum import Enum

_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
_ERRORS = re.compile(r"=+ ERROR SUMMARY: (\d+) error")
_RACES = re.compile(r"=+ RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warn")
# The tool's way to say that it cannot look at this device, whatever runs there.
_REFUSES = ("Device not supported", "No supported gpu devices", "Unable to find injection library")
# How compute-sanitizer is asked to leave when it has found something.
FOUND = 33


class Verdict(str, Enum):
    """How a step ended, or why it did not begin."""

    GREEN = "green"
    RED = "red"
    OVERRAN = "overran"  # its own limit: a kernel may hang
    EMPTY = "nothing ran"
    ABSENT = "cannot"  # something is not on this machine
    SKIPPED = "skipped"  # because of another step
    CUT = "cut off"  # the time of the whole run was up
    LEFT = "not run"

    @property
    def bad(self) -> bool:
        return self in (Verdict.RED, Verdict.OVERRAN)

    @property
    def open(self) -> bool:
        """Whether time was all that was missing."""
        return self in (Verdict.CUT, Verdict.LEFT)


def of_command(status: int, log: str) -> tuple[Verdict, str]:
    """A program that leaves with 0 when all is well."""
    if status == 0:
        return Verdict.GREEN, ""
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
    return Verdict.RED, f"status {status}: {last[:120]}"


def of_tests(status: int, log: str) -> tuple[Verdict, str]:
    """pytest: what was skipped has not run, and where nothing ran nothing is green."""
    counts = {word.removesuffix("s"): int(n) for n, word in _COUNT.findall(_last_line(log))}
    note = ", ".join(f"{n} {word}" for word, n in counts.items())
    if status not in (0, 5):
        return Verdict.RED, note or f"status {status}"
    return (Verdict.GREEN if counts.get("passed") else Verdict.EMPTY), note or "no tests"


def of_sanitizer(status: int, log: str) -> tuple[Verdict, str]:
    """compute-sanitizer: errors count, warnings of racecheck are told."""
    if any(words in log for words in _REFUSES):
        return Verdict.ABSENT, "the tool does not work on this device"
    races, errors = _RACES.findall(log), _ERRORS.findall(log)
    if not races and not errors:
        return Verdict.RED, f"status {status}, and the tool gave no summary"
    found = sum(int(n) for n, _ in races) + sum(map(int, errors))
    warnings = sum(int(n) for _, n in races)
    note = f"{found} errors" + (f", {warnings} warnings" if warnings else "")
    if found or status not in (0, FOUND):
        return Verdict.RED, note if found else f"{note}, but status {status}"
    return Verdict.GREEN, note


def _last_line(log: str) -> str:
    """pytest's own count; processes that end later may write below it."""
    lines = [line for line in log.splitlines() if _COUNT.search(line) and " in " in line]
    return lines[-1] if lines else ""
