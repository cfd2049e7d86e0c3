"""Builds ``hunyuan_fast._C`` through CMake and maps ``kernels/`` into the package.

A machine without a working compiler still gets a working package. ENVIRONMENT.md lists the
variables that steer the build.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "scripts"))

import native_sources  # noqa: E402

CHOICES = {
    "HUNYUAN_FAST_BUILD": ("auto", "cuda", "cpu", "none"),
    "HUNYUAN_FAST_REQUIRE_EXT": ("", "cpu", "cuda"),
}


def setting(name: str) -> str:
    value = os.environ.get(name, CHOICES[name][0])
    if value not in CHOICES[name]:
        raise SystemExit(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    return value


def cuda_architectures(torch_list: str) -> str:
    """``TORCH_CUDA_ARCH_LIST`` in CMake's words: "8.0;9.0a+PTX" is "80-real;90a"."""
    archs = []
    for name in torch_list.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        if name:
            archs.append(number if name.endswith("+PTX") else f"{number}-real")
    return ";".join(archs)


def tool(name: str) -> str | None:
    """The path of a program, looked for beside this interpreter first."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=beside)


def say(text: str) -> None:
    print(f"hunyuan-fast: {text}", file=sys.stderr)


class CMakeBuild(build_ext):
    """Tries CUDA (where nvcc is), then C++ alone, then goes without, as far as it may."""

    def build_extensions(self) -> None:
        wanted, required = setting("HUNYUAN_FAST_BUILD"), setting("HUNYUAN_FAST_REQUIRE_EXT")
        attempts = {"auto": ["auto", "cpu"], "cuda": ["cuda"], "cpu": ["cpu"], "none": []}[wanted]
        if required == "cuda":
            attempts = [kind.replace("auto", "cuda") for kind in attempts if kind != "cpu"]
        (extension,) = self.extensions
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # what an earlier build left must not pass for the result of this one
        target.unlink(missing_ok=True)
        if self.editable_mode:
            (ROOT / "hunyuan_fast" / target.name).unlink(missing_ok=True)
        if any(self.attempt(kind, target.parent) for kind in attempts):
            return
        if required:
            raise SystemExit(f"HUNYUAN_FAST_REQUIRE_EXT={required}, and the native build failed")
        self.extensions = []
        say(
            "installing without native kernels: the reference and Triton ones will answer. "
            "Native ones need a C++17 compiler (g++ 11 or later), CMake 3.20 and Ninja"
        )

    def attempt(self, kind: str, out: Path) -> bool:
        try:
            self.build(kind, out)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"the native build ({kind}) failed: {error}")
            return False
        return True

    def build(self, kind: str, out: Path) -> None:
        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None or ninja is None:
            raise OSError(f"{'cmake' if cmake is None else 'ninja'} is not on the path")
        args = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
        ]
        if kind != "auto":
            args.append(f"-DHUNYUAN_FAST_CUDA={'ON' if kind == 'cuda' else 'OFF'}")
        if archs := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            args.append(f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(archs)}")
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # a folder for each set of choices: CMake keeps the compilers that it found the first time
        choices = [args, *(os.environ.get(name) for name in ("CC", "CXX", "CUDACXX"))]
        digest = hashlib.sha256(repr(choices).encode()).hexdigest()[:8]
        tmp = Path(self.build_temp).resolve() / f"{kind}-{digest}"
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        # not among the choices: other sources are built in the same folder
        args.append(f"-DHUNYUAN_FAST_SOURCES={native_sources.digest(ROOT)}")
        subprocess.run([cmake, "-S", ROOT, "-B", tmp, "-G", "Ninja", *args], check=True)
        subprocess.run([cmake, "--build", tmp, *jobs], check=True)


rooms = find_packages("kernels")
setup(
    packages=[
        *find_packages(include=["hunyuan_fast", "hunyuan_fast.*"]),
        *(f"hunyuan_fast.kernels.{room}" for room in rooms),
    ],
    package_dir={"hunyuan_fast.kernels": "kernels"},
    ext_modules=[Extension("hunyuan_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
