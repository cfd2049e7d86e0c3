"""What there is to do on a machine with a GPU, stage by stage, found in the checkout itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import native_sources

from gpu_run import machine as machines
from gpu_run import verdicts
from gpu_run.machine import Machine
from gpu_run.verdicts import FOUND, Verdict

STAGES = ("build", "probe", "test", "sanitize", "bench", "tune")
WHOLES = "wholes"  # tests and benchmarks of no room
BUILD = "build native"
# Programs of single instructions, and what must be linked to each.
PROBES: Mapping[str, tuple[str, ...]] = {
    "sm90": (),
    "sm90_operands": ("csrc/common/sm90_tensor_map.cu",),
    "sm90_probes": ("csrc/common/sm90_tensor_map.cu",),
}
# What a room's kernels for Hopper do not use, they need not wait for.
_FEWER_PROBES = {"causal_conv3d": ("sm90",)}
# Of these most is to be gained by knowing; the others follow, and the wholes come last.
_MEASURED_FIRST = (
    *("rope3d_attention", "causal_conv3d"),
    *("fused_modulation", "qk_norm_rope", "group_norm_silu"),
)
# Tests of rooms in files that do not bear the room's name.
_OTHER_NAMES = {"norm_rope_attention": "rope3d_attention"}
# Tests of what nvcc compiles: by implementation, or by file.
_CUDA_TESTS = "cuda_impl or _sm90 or _cuda.py"
CASES = "cases"  # what the tools look at, without them
REQUIRED_TOOLS, MORE_TOOLS = ("memcheck", "racecheck"), ("synccheck", "initcheck")
_SHARED = ("csrc/common", "hunyuan_fast/dispatch.py", "hunyuan_fast/ops", "tests/kit")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some commands, one after the other, and what their output means.

    inputs: files and folders; a green verdict is about what they held
    unless_red: steps that must not be red.  after: steps that must have been done and not be red
    together: neighbours with the same word here run side by side, ``width`` at a time
    absent: why it cannot be done here.  ready: asked first; what it says is why nothing is to do
    """

    name: str
    stage: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    room: str | None = None
    judge: Callable[[int, str], tuple[Verdict, str]] = verdicts.of_command
    inputs: tuple[str, ...] = ()
    unless_red: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    together: str = ""
    width: int = 1
    required: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""
    ready: Callable[[], str] | None = None


def plan(
    root: Path, machine: Machine, out: Path, *, keep_going: bool = False, cases: str = ""
) -> list[Step]:
    """Every step of every stage, in the order in which they are done.

    keep_going: tests of a room go on after the first red one
    cases: benchmarks measure only cases with this in their name
    """
    return [
        _build(root, machine),
        *_probes(root, machine, out),
        *_tests(root, machine, keep_going),
        *_sanitize(root, machine),
        *_bench(root, machine, out, cases),
        *_tune(root, machine),
    ]


def rooms(root: Path) -> list[str]:
    """Rooms with kernels for a GPU, those with the least code first."""
    found = {path.parent.name for path in root.glob("kernels/*/*_impl.py") if _is_gpu(path)}
    return sorted(found, key=lambda room: (_code_size(root, room), room))


def test_files(root: Path) -> dict[str, list[str]]:
    """Files with tests that need a GPU, by room; the rest under ``wholes``."""
    known = rooms(root)
    found: dict[str, list[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text():
            found.setdefault(_room_of(path, known), []).append(str(path.relative_to(root)))
    return found


def hopper_probes(root: Path, room: str) -> tuple[str, ...]:
    """The probes whose instructions the room's kernels are made of."""
    if not any((root / "csrc" / room).glob("sm90*")):
        return ()
    return _FEWER_PROBES.get(room, tuple(PROBES))


def inputs_of(root: Path, room: str) -> tuple[str, ...]:
    """What a verdict on a room depends on: its own folders, and those that it imports from."""
    text = "".join(path.read_text() for path in (root / "kernels" / room).rglob("*.py"))
    related = {room, *re.findall(r"hunyuan_fast\.kernels\.(\w+)", text)}
    folders = [f"{wing}/{each}" for each in sorted(related) for wing in ("kernels", "csrc")]
    cases = sorted(str(p.relative_to(root)) for p in (root / "tests/ops").glob(f"{room}*.py"))
    return (*folders, *_SHARED, *cases)


def _build(root: Path, machine: Machine) -> Step:
    def ready() -> str:
        module = machines.native_module(root)
        if module is None:
            return ""
        sources, archs = machines.built_from(module)
        there = sources == native_sources.digest(root) and machine.arch in archs
        return f"{module.name} is of these sources, for {', '.join(archs)}" if there else ""

    arch = machine.capability + ("a" if machine.arch.endswith("a") else "")
    env = {"HUNYUAN_FAST_BUILD": "cuda", "HUNYUAN_FAST_REQUIRE_EXT": "cuda"}
    return Step(
        name=BUILD,
        stage="build",
        commands=((machine.python, "setup.py", "--quiet", "build_ext", "--inplace"),),
        limit=1200,
        inputs=("csrc", "CMakeLists.txt"),
        env={**env, "TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": str(machine.cores)},
        ready=ready,
    )


def _probes(root: Path, machine: Machine, out: Path) -> list[Step]:
    nvcc = machines.tool("nvcc")
    absent = "nvcc is not on the path" if nvcc is None else ""
    if machine.arch != "90a":
        absent = f"the probes are for sm_90a, this is {machine.arch}"
    steps = []
    for name, more in PROBES.items():
        source, program = f"tests/native/{name}.cu", str(out / "probes" / name)
        target = "-gencode=arch=compute_90a,code=sm_90a"
        compiled = (nvcc or "nvcc", "-std=c++17", target, "-Icsrc", source, *more, "-o", program)
        steps.append(
            Step(
                name=f"probe {name}",
                stage="probe",
                commands=(compiled, (program,)),
                limit=180,
                inputs=(source, *more, "csrc/common"),
                together="probe",
                width=len(PROBES),
                absent=absent,
            )
        )
    return steps


def _tests(root: Path, machine: Machine, keep_going: bool) -> list[Step]:
    files = test_files(root)
    stop = () if keep_going else ("-x",)
    # a process compiles a kernel at a time: rooms run side by side, and each in several processes;
    # tests that want the whole GPU wait for each other (tests/kit/turns.py)
    workers = str(max(1, min(4, machine.cores // 2)))
    share = ("-n", workers, "--dist", "load") if machine.many else ()
    quiet = ("-q", "--no-header", "-rfE", "-p", "no:cacheprovider")
    start = (machine.python, "-m", "pytest", "-m", "gpu", *stop, *quiet, *share)
    steps = []
    for room in (*(r for r in rooms(root) if r in files), WHOLES):
        inputs: tuple[str, ...] = ("kernels", "csrc", "hunyuan_fast", "tests")
        native = room != WHOLES and _has_cuda(root, room)
        if room != WHOLES:
            inputs = (*inputs_of(root, room), *files[room])
        for suffix, which in (("", f"not ({_CUDA_TESTS})"), (" cuda", _CUDA_TESTS)):
            if suffix and not native:
                continue
            chosen = ("-k", which) if native else ()
            probes = hopper_probes(root, room) if suffix else ()
            steps.append(
                Step(
                    name=f"test {room}{suffix}",
                    stage="test",
                    room=room,
                    commands=((*start, *chosen, *files.get(room, [])),),
                    limit=480,
                    judge=verdicts.of_tests,
                    inputs=inputs,
                    unless_red=(*((BUILD,) if suffix else ()), *_named("probe", probes)),
                    together="test",
                    width=max(1, machine.cores // 4),
                    absent="" if files.get(room) else "no test needs a GPU",
                )
            )
    return steps


def _sanitize(root: Path, machine: Machine) -> list[Step]:
    program = machines.tool("compute-sanitizer")
    options = (
        *("--error-exitcode", str(FOUND), "--target-processes", "application-only"),
        # what torch brings has barriers too, and the tool's own estimate has been too small
        *("--launch-timeout", "180", "--num-cuda-barriers", "1024", "--print-limit", "40"),
    )
    steps = []
    # first without a tool, at full speed: results are right, and Triton's cache is filled
    for tool in (CASES, *REQUIRED_TOOLS, *MORE_TOOLS):
        alone = tool == CASES
        under = () if alone else (program or "compute-sanitizer", "--tool", tool, *options)
        for room in rooms(root):
            probes = _named("probe", hopper_probes(root, room))
            steps.append(
                Step(
                    name=f"{tool} {room}",
                    stage="sanitize",
                    room=room,
                    commands=((*under, machine.python, "-m", "tests.sanitize", room),),
                    limit=420,
                    judge=verdicts.of_command if alone else verdicts.of_sanitizer,
                    inputs=(*inputs_of(root, room), "tests/sanitize.py", "tests/sanitize_cases"),
                    unless_red=probes if alone else (*probes, f"{CASES} {room}"),
                    together=tool,
                    # a tool finds ten ports for all that run at a time
                    width=max(1, min(6, machine.cores // 2)),
                    required=tool not in MORE_TOOLS,
                    env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    absent="" if alone or program else "compute-sanitizer is not on the path",
                )
            )
    return steps


def _bench(root: Path, machine: Machine, out: Path, cases: str) -> list[Step]:
    found = {path.stem.removeprefix("bench_") for path in root.glob("benchmarks/bench_*.py")}
    own = [room for room in rooms(root) if room in found]
    order = {room: at for at, room in enumerate(_MEASURED_FIRST)}
    own.sort(key=lambda room: order.get(room, len(order)))
    some, name = (("--only", cases), f" {cases}") if cases else ((), "")
    steps = []
    for op in (*own, *sorted(found - set(own))):
        room = op if op in own else WHOLES
        native = (f"test {room} cuda",) if room != WHOLES and _has_cuda(root, room) else ()
        whole = ("kernels", "csrc", "hunyuan_fast")
        about = whole if room == WHOLES else inputs_of(root, room)
        command = (machine.python, "-m", "benchmarks", op, "--missing", *some)
        steps.append(
            Step(
                name=f"bench {op}{name}",
                stage="bench",
                room=room,
                commands=((*command, "--tested", str(out / "state.json")),),
                limit=1500,
                judge=verdicts.of_benchmark,
                inputs=(*about, f"benchmarks/bench_{op}.py", "benchmarks/kit"),
                after=(f"test {room}", *native),
            )
        )
    return steps


def _tune(root: Path, machine: Machine) -> list[Step]:
    room, python = "rope3d_attention", (machine.python, "-m")
    native = (f"test {room} cuda",) if _has_cuda(root, room) else ()
    tuned = (*python, "hunyuan_fast", "bench", "attention", "--tune", "--backward")
    tune = partial(Step, stage="tune", room=room, limit=900)
    return [
        tune(
            name="tune attention",
            commands=(tuned,),
            inputs=inputs_of(root, room),
            after=(f"test {room}", *native),
        ),
        tune(
            name="tune ranking",
            commands=((*python, "benchmarks", "--commit-ranking"),),
            after=("tune attention",),
        ),
        tune(
            name="tune verified",
            room=None,
            commands=((*python, "benchmarks", "--commit-verified"),),
        ),
        tune(
            name="tune summary",
            commands=((*python, "benchmarks", "--summary"),),
            absent="" if (root / ".git").exists() else "pages show what git says is committed",
        ),
    ]


def _named(stage: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{stage} {name}" for name in names)


def _is_gpu(path: Path) -> bool:
    return path.stem in ("triton_impl", "cuda_impl")


def _has_cuda(root: Path, room: str) -> bool:
    return (root / "kernels" / room / "cuda_impl.py").is_file()


def _code_size(root: Path, room: str) -> int:
    files = [*(root / "kernels" / room).glob("triton*.py"), *(root / "csrc" / room).glob("*.cu*")]
    return sum(path.stat().st_size for path in files)


def _room_of(path: Path, known: list[str]) -> str:
    """The room with the longest name that the file begins with."""
    if path.parent.name != "ops":
        return WHOLES
    name = path.stem.removeprefix("test_")
    names = {**{room: room for room in known}, **_OTHER_NAMES}
    fitting = [each for each in names if name == each or name.startswith(f"{each}_")]
    return names[max(fitting, key=len)] if fitting else WHOLES
