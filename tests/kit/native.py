"""CUDA sources compiled by nvcc on a machine without a GPU: registers, spills, machine code."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
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


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One source as machine code, and what the compiler had to say."""

    cubin: bytes
    log: str


@cache
def build(source: Path, arch: str) -> Compiled:
    """Compile one source for ``sm_<arch>``.

    Raises RuntimeError with the compiler's words when it does not compile.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
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
                str(target),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"{source.name} does not compile for sm_{arch}:\n{done.stderr[-4000:]}"
            )
        return Compiled(cubin=target.read_bytes(), log=done.stderr)


def compile_cuda(source: Path, arch: str) -> tuple[KernelUsage, ...]:
    """What each kernel of a source uses when compiled for ``sm_<arch>``."""
    return _usage(build(source, arch).log)


def disassembler() -> Path | None:
    """nvdisasm, of the CUDA toolkit or of the Triton wheel; ``None`` when there is none."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    triton = find_spec("triton")
    folders = [Path("/usr/local/cuda/bin")]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return next((tool for folder in folders if (tool := folder / "nvdisasm").exists()), None)


@cache
def machine_code(source: Path, arch: str) -> dict[str, str]:
    """The instructions of each kernel of a source, by its mangled name."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("nvdisasm is not installed")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(build(source, arch).cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    sections = re.split(r"\.section\s+\.text\.(\w+)", done.stdout)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))


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
