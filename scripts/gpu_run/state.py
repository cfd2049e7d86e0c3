"""What is known of every step, kept in a file, and shown as a table."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_run.steps import Step
from gpu_run.verdicts import Verdict

# What a run changes in the checkout, beside its own folder.
_CHANGED = ("benchmarks/results", "docs", "kernels")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How a step ended. about: the digest of what it was run on."""

    verdict: Verdict
    seconds: float
    note: str
    log: str
    about: str


class State:
    """The entries of ``DIR/state.json``, written after every step."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.path, self.gpu = folder / "state.json", gpu
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self.started = time.time()
        if self.path.is_file():
            self._read()

    def get(self, name: str) -> Entry | None:
        """What is known of a step, on this card."""
        return self._entries.get(name)

    def put(self, name: str, entry: Entry) -> None:
        """Remember how a step ended."""
        with self._lock:
            self._entries[name] = entry
            steps = {key: asdict(each) for key, each in self._entries.items()}
            kept = {"gpu": self.gpu, "started": self.started, "steps": steps}
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(kept, indent=1))
            draft.replace(self.path)

    def _read(self) -> None:
        try:
            kept: dict[str, Any] = json.loads(self.path.read_text())
            entries = {
                name: Entry(**{**each, "verdict": Verdict(each["verdict"])})
                for name, each in kept["steps"].items()
            }
            gpu, started = kept["gpu"], float(kept["started"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(
                f"{self.path} is no state of an earlier run ({error}): move it away"
            ) from None
        if gpu == self.gpu:
            self._entries, self.started = entries, started


def digest(root: Path, step: Step) -> str:
    """Of the contents of a step's inputs, and of what it runs."""
    total = hashlib.sha256(repr([command[1:] for command in step.commands]).encode())
    for name in step.inputs:
        for path in _files(root / name):
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def table(steps: Sequence[Step], state: State) -> str:
    """A line for every step: verdict, seconds, what is to be said, where its log is."""
    lines = []
    for step in steps:
        entry = state.get(step.name)
        if entry is None:
            lines.append((step.name, Verdict.LEFT.value, "", "", ""))
            continue
        verdict = entry.verdict.value + ("" if step.required else " (informative)")
        log = entry.log
        lines.append((step.name, verdict, f"{entry.seconds:.0f} s", entry.note[:60], log))
    head = ("step", "verdict", "time", "note", "log")
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = (
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )
    return "\n".join(rows)


def pack(target: Path, folder: Path, root: Path, since: float) -> int:
    """Logs, state and what has changed in the checkout since, in one archive; how many files."""
    own = [path for path in _files(folder) if path.suffix in (".log", ".json")]
    changed = [path for name in _CHANGED for path in _files(root / name) if _time(path) >= since]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz") as archive:
        for path in own:
            archive.add(path, f"run/{path.relative_to(folder)}")
        for path in changed:
            archive.add(path, f"changed/{path.relative_to(root)}")
    return len(own) + len(changed)


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    found = (each for each in path.rglob("*") if each.is_file())
    return sorted(each for each in found if "__pycache__" not in each.parts)


def _time(path: Path) -> float:
    return path.stat().st_mtime
