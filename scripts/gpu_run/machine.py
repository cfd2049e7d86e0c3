"""The card, the cores and the tools at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Where CUDA's tools are when nobody put them on the path.
_CUDA = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


class NoGpu(Exception):
    """There is no GPU to work with; the message says what was asked and what came."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """capability: 9.0 for Hopper. many: pytest can share its work among processes."""

    gpu: str
    capability: str
    cores: int
    python: str
    many: bool

    @property
    def arch(self) -> str:
        """The target of the compiler; Hopper's own instructions want the ``a``."""
        number = self.capability.replace(".", "")
        return f"{number}a" if number == "90" else number


def describe() -> Machine:
    """The first GPU of this machine. Raises NoGpu."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoGpu(f"nvidia-smi does not run: {error}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or "," not in lines[0]:
        raise NoGpu(
            f"nvidia-smi names no GPU: {(done.stdout + done.stderr).strip() or 'no output'}"
        )
    name, capability = (word.strip() for word in lines[0].rsplit(",", 1))
    return Machine(
        gpu=name,
        capability=capability,
        cores=len(os.sched_getaffinity(0)),
        python=sys.executable,
        many=find_spec("xdist") is not None,
    )


def environment() -> dict[str, str]:
    """That of every step: CUDA's tools can be found, output comes line by line."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_CUDA])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def tool(name: str) -> str | None:
    """The path of a program."""
    return shutil.which(name, path=environment()["PATH"])


def native_module(root: Path) -> Path | None:
    """The module that this Python would load from the checkout."""
    suffix = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    return next(iter(sorted((root / "hunyuan_fast").glob(f"_C.{suffix}*.so"))), None)


def built_from(module: Path) -> tuple[str, tuple[str, ...]]:
    """Of which sources, for which architectures: what the module says in a process of its own."""
    code = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location as at\n"
        "spec = at('_C', sys.argv[1]); native = module_from_spec(spec)\n"
        "spec.loader.exec_module(native)\n"
        "print(getattr(native, 'sources', '-'), *native.cuda_archs)"
    )
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True)
    sources, *archs = done.stdout.split() or ["-"]
    return sources, tuple(archs)
