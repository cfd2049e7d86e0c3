"""Why a job ended: one verdict out of what its processes say at their ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

# done: all is well. usage: the command line is wrong. failed: an error of the process itself.
# died: it is gone without a word. link: another process did not answer it, or told it of an error.
# interrupted, terminated: somebody has told it to stop.
Kind = Literal["done", "usage", "failed", "died", "link", "interrupted", "terminated"]
FAILURE, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
STATUS: dict[str, int] = {
    "done": 0,
    "usage": USAGE,
    "failed": FAILURE,
    "died": FAILURE,
    "link": FAILURE,
    "interrupted": INTERRUPTED,
    "terminated": TERMINATED,
}
# The first of these that any process says is the cause of what the later ones say.
CAUSES: tuple[frozenset[str], ...] = (
    frozenset({"usage", "failed", "died"}),
    frozenset({"interrupted"}),
    frozenset({"terminated"}),
    frozenset({"link"}),
)
DEATH = "error: it is gone without a word: killed, out of host memory, or its machine is"


@dataclass(frozen=True)
class End:
    """How the work of one process ended, and what it says about that, in one line."""

    rank: int
    host: str
    kind: Kind
    text: str = ""


@dataclass(frozen=True)
class Verdict:
    """How the job ended, and the lines that tell it to the user."""

    kind: Kind
    lines: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """Exit status of every process."""
        return STATUS[self.kind]


def judge(ends: Iterable[End], world_size: int) -> Verdict | None:
    """What ends a job of so many processes, ``None`` while nothing does.

    Consequences are left out: who is told to stop, or hears no more of another, because that one
    has failed. Processes that say the same share a line; a wrong command line is that of the job,
    and so are signals.
    """
    ends = sorted(ends, key=lambda end: end.rank)
    for kinds in CAUSES:
        chosen = [end for end in ends if end.kind in kinds]
        if chosen:
            break
    else:
        return Verdict("done") if len(ends) == world_size else None
    same: dict[tuple[Kind, str], list[End]] = {}
    for end in chosen:
        same.setdefault((end.kind, end.text), []).append(end)
    lines = tuple(_line(group, world_size) for group in same.values())
    kind: Kind = next((end.kind for end in chosen if end.kind != "usage"), "usage")
    return Verdict(kind, lines)


def _line(ends: Sequence[End], world_size: int) -> str:
    kind, text = ends[0].kind, ends[0].text
    if kind in ("interrupted", "terminated") or (kind == "usage" and ends[0].rank == 0):
        return text
    hosts = ", ".join(dict.fromkeys(end.host for end in ends))
    ranks = [end.rank for end in ends]
    name = "rank" if len(ranks) == 1 else "ranks"
    return f"{name} {_ranges(ranks)} of {world_size} ({hosts}): {text}"


def _ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers in few words: 0-3, 5."""
    breaks = [i for i, (a, b) in enumerate(pairwise(ranks), 1) if b != a + 1]
    runs = [ranks[i:j] for i, j in pairwise([0, *breaks, len(ranks)])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
