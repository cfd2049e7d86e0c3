"""Turns on a GPU, by processes that only write down when they were where."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.turns import turn

ROOT = Path(__file__).parents[1]
# enters, writes "+", stays, writes "-"; then again
GUEST = """
import sys, time
from pathlib import Path
sys.modules["torch"] = type(sys)("torch")  # the locks need none of it
from tests.kit.turns import turn
folder, name, alone, stay, times = sys.argv[1:]
for _ in range(int(times)):
    with turn(alone=alone == "alone", folder=Path(folder) / "locks"):
        with open(Path(folder) / "log", "a") as log:
            log.write(f"+{name}\\n")
        time.sleep(float(stay))
        with open(Path(folder) / "log", "a") as log:
            log.write(f"-{name}\\n")
"""


def guest(folder: Path, name: str, alone: bool, stay: float, times: int) -> subprocess.Popen[bytes]:
    words = [str(folder), name, "alone" if alone else "shared", str(stay), str(times)]
    return subprocess.Popen([sys.executable, "-c", GUEST, *words], cwd=ROOT)


def log_of(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.is_file() else []


def wait_until(folder: Path, line: str) -> None:
    end = time.monotonic() + 30
    while line not in log_of(folder):
        assert time.monotonic() < end, f"no {line} in {log_of(folder)}"
        time.sleep(0.01)


def test_who_is_alone_meets_nobody(tmp_path: Path) -> None:
    guests = [guest(tmp_path, name, name in "xy", 0.02, 6) for name in "abxy"]
    assert [each.wait(60) for each in guests] == [0] * 4
    present: set[str] = set()
    lines = log_of(tmp_path)
    assert len(lines) == 4 * 6 * 2
    for sign, name in lines:
        if sign == "-":
            present.remove(name)
            continue
        present.add(name)
        assert len(present) == 1 or not present & {"x", "y"}, lines


def test_others_are_there_side_by_side(tmp_path: Path) -> None:
    guests = [guest(tmp_path, name, False, 60.0, 1) for name in "ab"]
    for name in "ab":
        wait_until(tmp_path, f"+{name}")
    assert len(log_of(tmp_path)) == 2
    for each in guests:
        each.kill()
        each.wait()


def test_who_waits_to_be_alone_keeps_newcomers_out(tmp_path: Path) -> None:
    """Else two that come and go would never leave the GPU empty."""
    guests = [guest(tmp_path, name, False, 0.05, 60) for name in "ab"]
    wait_until(tmp_path, "+b")
    wait_until(tmp_path, "+a")
    guests.append(guest(tmp_path, "x", True, 0.0, 1))
    wait_until(tmp_path, "-x")
    assert all(each.poll() is None for each in guests[:2]), "it waited for them to end"
    for each in guests:
        each.kill()
        each.wait()


def test_a_turn_ends_with_its_process(tmp_path: Path) -> None:
    killed = guest(tmp_path, "x", True, 60.0, 1)
    wait_until(tmp_path, "+x")
    killed.kill()
    killed.wait()
    with turn(alone=True, folder=tmp_path / "locks"):
        assert log_of(tmp_path) == ["+x"]


def test_a_turn_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the test"), turn(alone=True, folder=tmp_path):
        raise ValueError("of the test")
    with turn(alone=False, folder=tmp_path), turn(alone=False, folder=tmp_path):
        pass
