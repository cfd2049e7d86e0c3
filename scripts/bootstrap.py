"""Sets up ``.venv`` for the Makefile, from a bare Python: environment, torch, the package.

Every step is skipped when what it depends on has not changed, so a second run takes no time.
Without an NVIDIA GPU torch is pinned to the release the tests run on, its CPU build where that can
be had; with one, the torch of the calling Python is used if it knows CUDA, else pip's default build
is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "bootstrap.json"
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_TOOLS = ["setuptools>=77", "wheel", "pybind11>=3.0", "cmake>=3.20", "ninja"]

# Fails unless the environment's own torch is the release of its first argument, any build of it.
FIND_CPU_TORCH = """
import importlib.metadata, sys
wanted = sys.argv[1].partition("==")[2]
raise SystemExit(importlib.metadata.version("torch").split("+")[0] != wanted)
"""

# Prints where the torch of the calling Python lives, if it can drive a GPU and is recent enough.
FIND_CUDA_TORCH = """
import pathlib, torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if torch.cuda.is_available() and version >= (2, 10):
    print(pathlib.Path(torch.__file__).parents[1])
"""


def main() -> None:
    """Run the steps that are due."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", choices=["dev"], help="also install this extra of the package")
    extra = parser.parse_args().extra
    if tuple(sys.version_info) < (3, 10):
        raise SystemExit(
            f"this is Python {sys.version.split()[0]}, hunyuan-fast needs 3.10 or later"
        )

    done = read_stamp()
    python = f"{sys.executable} {sys.version}"
    if done.get("python") != python:
        done = {}
        step(f"creating the virtual environment {VENV.name} with Python {sys.version.split()[0]}")
        create_environment()
        record(done, "python", python)
    if "torch" not in done:
        record(done, "torch", install_torch())
    if done.get("package") != fingerprint() or (extra and done.get("extra") != extra):
        name = f"hunyuan-fast[{extra}]" if extra else "hunyuan-fast"
        step(f"installing {name} from this checkout and building its native kernels")
        pip("install", *BUILD_TOOLS)
        source = f"{ROOT}[{extra}]" if extra else str(ROOT)
        pip("install", "--no-build-isolation", "--editable", source)
        done["extra"] = extra or done.get("extra")
        record(done, "package", fingerprint())
    step(f"environment ready: {VENV.name}, torch from {done['torch']}")


def create_environment() -> None:
    """An empty environment with pip in it."""
    try:
        venv.EnvBuilder(clear=True, with_pip=True, symlinks=True).create(VENV)
    except subprocess.CalledProcessError:
        if shutil.which("virtualenv") is None:
            raise SystemExit(
                "this Python cannot create virtual environments with pip: install your system's "
                "python3-venv package, or virtualenv, and run again"
            ) from None
        subprocess.run(["virtualenv", "--clear", "-p", sys.executable, str(VENV)], check=True)


def install_torch() -> str:
    """Put torch into the environment and say where it comes from."""
    if not has_gpu():
        return install_cpu_torch()
    found = subprocess.run([sys.executable, "-c", FIND_CUDA_TORCH], capture_output=True, text=True)
    site = found.stdout.strip()
    if found.returncode == 0 and site:
        step(f"NVIDIA GPU: using the torch that is there, in {site}")
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.check_output([VENV / "bin/python", "-c", query], text=True).strip()
        # found after the environment's own packages; its neighbours are torch's dependencies
        Path(own, "torch_of_the_system.pth").write_text(site + "\n")
        return site
    step("NVIDIA GPU: installing the default build of torch (a large download)")
    pip("install", "torch>=2.10")
    return "pip's default build"


def install_cpu_torch() -> str:
    """Put the CPU build into the environment, from pip's indexes or else from PyTorch's own.

    PyPI's build of the same release works too, but carries CUDA libraries of several GB: it comes
    last. A torch of that release that is already there is kept.
    """
    if has_cpu_torch():
        step(f"no NVIDIA GPU here: {CPU_TORCH} is there already")
        return f"{CPU_TORCH}, found in the environment"
    build = f"{CPU_TORCH}+cpu"
    step(f"no NVIDIA GPU here: installing {build} from pip's indexes (the largest download)")
    if try_pip("install", build):
        return build
    step(f"pip's indexes did not give {build}: trying {CPU_INDEX}")
    if try_pip("install", build, "--index-url", CPU_INDEX):
        return f"{build} of {CPU_INDEX}"
    step(f"{CPU_INDEX} did not give it either: installing {CPU_TORCH}, with its CUDA libraries")
    pip("install", CPU_TORCH)
    return CPU_TORCH


def has_cpu_torch() -> bool:
    """True when the environment holds the pinned release."""
    command = [VENV / "bin/python", "-c", FIND_CPU_TORCH, CPU_TORCH]
    return subprocess.run(command, capture_output=True).returncode == 0


def has_gpu() -> bool:
    """True when the driver answers and lists a GPU."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def fingerprint() -> str:
    """Changes when the installed package or its native module would."""
    sources = [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt")]
    sources += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    digest = hashlib.sha256(str(ROOT).encode())
    for path in sources:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    # a lost module and a new compiler are reasons to build again, whatever the sources say
    built = any((ROOT / "hunyuan_fast").glob("_C*.so"))
    compilers = [shutil.which(name) for name in ("c++", "nvcc")]
    return f"{digest.hexdigest()} built={built} compilers={compilers}"


def record(done: dict[str, str], key: str, value: str) -> None:
    """Remember a finished step, so that an interrupted setup goes on where it stopped."""
    done[key] = value
    partial = STAMP.with_suffix(".part")
    partial.write_text(json.dumps(done, indent=1))
    partial.replace(STAMP)


def read_stamp() -> dict[str, str]:
    """The finished steps; none when the stamp is missing or damaged."""
    try:
        done = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) else {}


def pip(*args: str) -> None:
    """Run the environment's pip; its errors are shown, its progress is not."""
    if code := subprocess.run(pip_command(*args)).returncode:
        raise SystemExit(f"pip {' '.join(args)} failed with status {code}; see above")


def try_pip(*args: str) -> bool:
    """Run the environment's pip where another way is left; its last error is shown."""
    result = subprocess.run(pip_command(*args), stderr=subprocess.PIPE, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"pip failed: status {result.returncode}"]
        print(f"    {lines[-1]}", flush=True)
    return result.returncode == 0


def pip_command(*args: str) -> list[str]:
    """The environment's pip, quiet."""
    command = [str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
    return [*command, args[0], "--quiet", *args[1:]]


def step(text: str) -> None:
    """Say what happens, with the seconds since the start."""
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


START = time.monotonic()

if __name__ == "__main__":
    main()
