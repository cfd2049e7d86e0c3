"""CUDA sources compiled by nvcc on a machine without a GPU: registers, spills, stack."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a")


@dataclass(frozen=True, kw_only=True)
class KernelUsage:
    """What ptxas says about one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def nvcc() -> str | None:
    """The CUDA compiler, or ``None`` when the machine has none."""
    return shutil.which("nvcc") or next(
        (str(path) for path in [Path("/usr/local/cuda/bin/nvcc")] if path.exists()), None
    )


@cache
def compile_cuda(source: Path, arch: str) -> tuple[KernelUsage, ...]:
    """Compile one source for ``sm_<arch>`` to machine code and report on each of its kernels.

    Raises RuntimeError with the compiler's words when it does not compile.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                compiler,
                "-std=c++17",
                "-O3",
                "--expt-relaxed-constexpr",
                f"-gencode=arch=compute_{arch},code=sm_{arch}",
                "-Xptxas=-v",
                f"-I{ROOT / 'csrc'}",
                "--cubin",
                str(source),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr[-4000:]}")
    return _usage(done.stderr)


def assert_no_spills(source: Path, arch: str) -> None:
    """Raise AssertionError when a kernel in ``source`` keeps registers in local memory."""
    usage = compile_cuda(source, arch)
    if not usage:
        raise AssertionError(f"{source.name} holds no kernel for sm_{arch}")
    for kernel in usage:
        if kernel.spill_bytes or kernel.stack_bytes:
            raise AssertionError(
                f"{kernel.name} in {source.name} for sm_{arch}: {kernel.spill_bytes} bytes "
                f"spilled, {kernel.stack_bytes} bytes of stack, {kernel.registers} registers"
            )


def _usage(log: str) -> tuple[KernelUsage, ...]:
    kernels = []
    for entry in re.split(r"Compiling entry function", log)[1:]:
        name = re.search(r"'([^']+)'", entry)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        registers = re.search(r"Used (\d+) registers", entry)
        if not (name and frame and registers):
            raise RuntimeError(f"ptxas wrote something unexpected:\n{entry[:500]}")
        kernels.append(
            KernelUsage(
                name=name.group(1),
                registers=int(registers.group(1)),
                stack_bytes=int(frame.group(1)),
                spill_bytes=int(frame.group(2)) + int(frame.group(3)),
            )
        )
    return tuple(kernels)
