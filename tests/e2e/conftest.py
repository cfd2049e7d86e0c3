"""The command line, called in this process or as a user would, on a model of random weights."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.e2e import tiny_pipeline

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; fails if there are more, or a traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("hunyuan-fast: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(f"{lines[0]}\n"), "the error comes last"
        return lines[0].removeprefix("hunyuan-fast: ")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder in the native layout."""
    return tiny_pipeline.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small loses time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Run a command in this process, in an empty directory, without network."""
    from hunyuan_fast.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def command() -> list[str]:
    """The command as a program, for a subprocess."""
    return [sys.executable, "-m", "hunyuan_fast"]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a subprocess: this checkout, no network, one thread."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def run_program(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Run a command as a user does, in an empty directory."""

    def call(*words: object, **options: object) -> Outcome:
        done = subprocess.run(
            [*command, *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call
