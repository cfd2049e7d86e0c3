"""Training state on disk: written whole or not at all, checked by digest, the last two kept."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new content, never a part."""
    part = path.with_name(path.name + ".tmp")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class CheckpointFolder:
    """States of one training stage, ``state-<step>.pt`` with its digest in ``state-<step>.json``.

    The digest is written last: a state without one is an interrupted write and is ignored.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a complete state, oldest first."""
        found = (path.stem.removeprefix("state-") for path in self.folder.glob("state-*.json"))
        return sorted(int(step) for step in found)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` finished steps, then drop all but the newest ``keep``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"state-{step}.pt"
        part = path.with_suffix(".pt.tmp")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        digest = _digest(part)
        part.replace(path)
        write_atomically(path.with_suffix(".json"), json.dumps({"step": step, "sha256": digest}))
        for old in self.steps()[: -self.keep]:
            self.folder.joinpath(f"state-{old}.json").unlink()
            self.folder.joinpath(f"state-{old}.pt").unlink(missing_ok=True)

    def load_newest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state whose digest holds, or None if there is no state at all.

        Raises ValueError if states exist but every one is damaged.
        """
        step = self.newest()
        return None if step is None else (step, self.load(step))

    def load(self, step: int) -> dict[str, Any]:
        """The state after ``step`` steps, whose tensors are read from the file as they are used."""
        return torch.load(self.folder / f"state-{step}.pt", weights_only=True, mmap=True)

    def newest(self) -> int | None:
        """The step of the newest state whose digest holds, or None if there is no state at all.

        Raises ValueError if states exist but every one is damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self.folder / f"state-{step}.pt"
            wanted = json.loads(path.with_suffix(".json").read_text())["sha256"]
            if path.is_file() and _digest(path) == wanted:
                return step
            damaged.append(path.name)
        if damaged:
            raise ValueError(
                f"{self.folder}: every saved state is damaged ({', '.join(damaged)}); "
                "delete the folder to train this stage anew"
            )
        return None
