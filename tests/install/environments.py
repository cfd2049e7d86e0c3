"""Fresh virtual environments that have this one's third-party packages, and not this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LEFT_BEHIND = (".git", ".venv", "build", "dist", "demo", "runs", "*.so", "*.egg-info", "*_cache")


def copy_of_the_checkout(folder: Path) -> Path:
    """The sources without anything that was built in them."""
    ignore = shutil.ignore_patterns(*LEFT_BEHIND, "__pycache__")
    return shutil.copytree(ROOT, folder / "checkout", ignore=ignore)


def borrowed_packages(folder: Path) -> Path:
    """A folder of links to every installed package but this one: torch is not installed again."""
    folder.mkdir()
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for site in dict.fromkeys([*sites, str(Path(torch.__file__).parents[1])]):
        for path in Path(site).iterdir():
            ours = "hunyuan_fast" in path.name or path.suffix in (".pth", ".egg-link")
            link = folder / path.name
            if not ours and path.name != "__pycache__" and not link.exists():
                link.symlink_to(path)
    return folder


class Environment:
    """A virtual environment in ``folder`` that sees ``borrowed`` after its own packages."""

    def __init__(self, folder: Path, borrowed: Path) -> None:
        venv.EnvBuilder(symlinks=True).create(folder)
        self.folder = folder
        self.site = next(folder.glob("lib/python*/site-packages"))
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n")

    def pip(self, *args: str | Path, **env: str) -> str:
        """Run pip for this environment and return what it says."""
        command = [sys.executable, "-m", "pip", "--python", self.folder / "bin/python", *args]
        return run(command, **env)

    def python(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``code`` away from any checkout; the two streams come back apart."""
        return subprocess.run(
            [self.folder / "bin/python", "-c", code],
            cwd=self.folder,
            env=clean(env),
            capture_output=True,
            text=True,
        )

    def command(self, *args: str | Path) -> str:
        """Run an installed program and return what it says."""
        return run([self.folder / "bin" / args[0], *args[1:]], cwd=self.folder)


def run(command: list[str | Path], cwd: Path | None = None, **env: str) -> str:
    """Run a program that must succeed and return what it says on both streams."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=clean(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-6000:]}"
    return result.stdout


def clean(env: dict[str, str]) -> dict[str, str]:
    """This process's environment without what would lead Python or the build elsewhere."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "HUNYUAN_FAST", "TRITON_INTERPRET", "CXX", "CC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | env
