"""No figures from an op whose tests fail."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kit.discover import ROOT, WHOLES, ops


@dataclass(frozen=True)
class Verdict:
    """How the tests of an op ended; ``summary`` is what to show."""

    passed: bool
    summary: str


def test_files(op: str, root: Path = ROOT) -> list[Path]:
    """``tests/ops/test_<op>.py`` and ``test_<op>_*.py``, save what belongs to a longer name.

    Those that :data:`WHOLES` names for what is no op.
    """
    if op in WHOLES:
        return [root / name for name in WHOLES[op]]
    longer = [f"test_{other}" for other in ops() if other.startswith(f"{op}_")]
    files = (root / "tests" / "ops").glob(f"test_{op}*.py")
    return sorted(
        path
        for path in files
        if (path.stem == f"test_{op}" or path.stem.startswith(f"test_{op}_"))
        and not path.stem.startswith(tuple(longer))
    )


def seen_by(state: Path, op: str) -> Verdict:
    """What ``scripts/gpu.py`` has seen of the tests of an op that need a GPU, in its state."""
    room = "wholes" if op in WHOLES else op
    try:
        steps = json.loads(state.read_text())["steps"]
        known = {name: steps[name]["verdict"] for name in steps}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Verdict(False, f"{state} is no state of scripts/gpu.py: {error!r}")
    first, native = known.get(f"test {room}"), known.get(f"test {room} cuda")
    passed = first == "green" and native in (None, "green", "nothing ran")
    words = ", ".join(word for word in (first or "not run", native) if word)
    return Verdict(passed, f"scripts/gpu.py has tested {room}: {words}")


def run_tests(op: str, root: Path = ROOT) -> Verdict:
    """Run the tests of an op in a process of their own."""
    files = test_files(op, root)
    needed = WHOLES.get(op, (f"tests/ops/test_{op}.py",))
    if missing := [name for name in needed if not (root / name).is_file()]:
        return Verdict(False, f"{missing[0]} does not exist")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *map(str, files)], cwd=root, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    # When red, the list of failures stands above the last line.
    return Verdict(
        done.returncode == 0, "\n".join(lines[-1:] if done.returncode == 0 else lines[-30:])
    )
