"""Triton kernels compiled for GPUs that are not there: registers, spills, memory accesses.

``compile_ahead(specialisations)`` starts one Python process without the interpreter, because a
process either compiles kernels or interprets them, and reads the machine code with the tools that
the Triton wheel brings. Results are kept for the session, and Triton's own cache keeps the code.

    report = compile_ahead([Specialisation(
        module="hunyuan_fast.kernels.<op>.triton_impl",
        kernel="_forward_kernel",
        signature={"x_ptr": "*bf16", "length": "i32", "eps": "fp32"},
        constants={"BLOCK_E": 4096},
        num_warps=8,
        arch=90,
    )])[0]
    report.assert_lean(max_registers=64)

``python -m pytest tests/ops -k ahead --resources`` prints what every kernel of the tests uses.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """One kernel at one set of types, constants and launch options, for one architecture.

    signature: the run-time arguments by name, in Triton's words ("*bf16", "i32", "fp32").
    constants: the constexpr arguments; a string such as "tl.bfloat16" names a Triton type.
    unaligned: arguments that are not multiples of 16; by default all pointers and integers are.
    maxnreg: a limit on registers per thread, where the launch sets one.
    arch: compute capability without the point (80, 89, 90, 100).
    """

    module: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    arch: int = 90


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses, and the accesses found in its machine code."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_memory_instructions: int
    global_accesses: Mapping[int, int]  # width of one access in bits -> count
    double_precision: bool
    tensor_core_instructions: Mapping[str, int]

    def assert_lean(
        self,
        *,
        max_registers: int = 255,
        min_access_bits: int | None = None,
        max_spills: int | None = None,
    ) -> None:
        """No spills, no double precision, registers within bounds.

        min_access_bits: at least one global access is this wide (128 for streaming kernels).
        max_spills: local loads and stores of four bytes; by default none on Hopper, and elsewhere
            one of each: to come down to a step of occupancy the assembler of some releases lays
            one number aside, which it fetches after the loop.
        """
        label = f"{self.kernel} on sm_{self.arch}"
        if max_spills is None:
            max_spills = 0 if self.arch == 90 else 2
        spills = self.local_memory_instructions
        if spills > max_spills or self.stack_bytes > 4 * max_spills:
            raise AssertionError(
                f"{label} spills: {self.stack_bytes} bytes of stack, "
                f"{self.local_memory_instructions} local loads and stores"
            )
        if self.double_precision:
            raise AssertionError(f"{label} computes in double precision")
        if self.registers > max_registers:
            raise AssertionError(f"{label} needs {self.registers} registers, over {max_registers}")
        if min_access_bits is not None and max(self.global_accesses, default=0) < min_access_bits:
            raise AssertionError(
                f"{label} has no global access of {min_access_bits} bits, only "
                f"{dict(self.global_accesses)} (width: count)"
            )


# What this session has compiled.
_reported: list[tuple[Specialisation, Resources]] = []


def compile_ahead(specialisations: Sequence[Specialisation]) -> list[Resources]:
    """Compile all of them in one process and report on each, in order.

    Raises RuntimeError with the compiler's words when one does not compile.
    """
    request = json.dumps([asdict(specialisation) for specialisation in specialisations])
    reports = [_resources(entry) for entry in json.loads(_compile_in_process(request))]
    _reported.extend(zip(specialisations, reports, strict=True))
    return reports


def resources_table() -> list[str]:
    """A table in Markdown: of every kernel and architecture compiled so far the largest use."""
    rows: dict[tuple[str, str, int], list[Resources]] = {}
    for asked, found in _reported:
        room = asked.module.split(".")[-2]
        rows.setdefault((room, found.kernel, found.arch), []).append(found)
    lines = [
        "| op | kernel | architecture | variants | registers | spills | bytes per access |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for (room, kernel, arch), found in sorted(rows.items()):
        spills = max(r.stack_bytes + r.local_memory_instructions for r in found)
        widest = min(max(r.global_accesses) for r in found) // 8
        lines.append(
            f"| {room} | {kernel} | sm_{arch} | {len(found)} | {max(r.registers for r in found)} "
            f"| {spills} | {widest} |"
        )
    return lines


@cache
def _compile_in_process(request: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton's default is about to change, and results with it.
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.aot"],
        input=request,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stderr[-4000:]}")
    return done.stdout.splitlines()[-1]


def _resources(entry: dict) -> Resources:
    entry["global_accesses"] = {int(k): v for k, v in entry["global_accesses"].items()}
    return Resources(**entry)


def _compile(specialisation: Specialisation) -> Resources:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(specialisation.module), specialisation.kernel)
    names = kernel.arg_names
    constants = {
        name: getattr(tl, value[3:]) if str(value).startswith("tl.") else value
        for name, value in specialisation.constants.items()
    }
    given = {**specialisation.signature, **constants}
    if set(given) != set(names):
        raise ValueError(
            f"{specialisation.kernel} takes {names}; missing {sorted(set(names) - set(given))}, "
            f"unknown {sorted(set(given) - set(names))}"
        )
    aligned = [
        index
        for index, name in enumerate(names)
        if specialisation.signature.get(name, "").startswith(("*", "i"))
        and name not in specialisation.unaligned
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: specialisation.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    wanted = ("num_warps", "num_stages", "maxnreg")
    options = {name: getattr(specialisation, name) for name in wanted}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", specialisation.arch, 32), options=options
    )
    return _read(specialisation, compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata)


def _read(specialisation: Specialisation, ptx: str, cubin: bytes, metadata: object) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    accesses: dict[int, int] = {}
    for modifiers in re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]+)", code):
        bits = next((int(w) for w in re.findall(r"\b[US]?(8|16|64|128|256)\b", modifiers)), 32)
        accesses[bits] = accesses.get(bits, 0) + 1
    matrix = ("HMMA", "QMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
    return Resources(
        kernel=specialisation.kernel,
        arch=specialisation.arch,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=metadata.shared,
        local_memory_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        global_accesses=accesses,
        double_precision=".f64" in ptx,
        tensor_core_instructions={
            name: count for name in matrix if (count := len(re.findall(rf"\b{name}\b", code)))
        },
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _main() -> None:
    specialisations = [Specialisation(**entry) for entry in json.load(sys.stdin)]
    print(json.dumps([asdict(_compile(each)) for each in specialisations]))


if __name__ == "__main__":
    _main()
