"""``scripts/gpu.py`` over a small checkout, with stand-ins for the card and for every tool."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

FILES = {
    "kernels/gelu_tanh/triton_impl.py": "small = 1\n",
    "kernels/gelu_tanh/reference.py": "",
    "kernels/causal_conv3d/triton_impl.py": "rather = 'more' * 1000  # than the other\n",
    "kernels/causal_conv3d/cuda_impl.py": "from hunyuan_fast.kernels.gelu_tanh import reference\n",
    "kernels/cpu_only/cpu_impl.py": "",
    "csrc/causal_conv3d/sm90_forward.cu": "",
    "csrc/common/sm90_tensor_map.cu": "",
    "CMakeLists.txt": "",
    "hunyuan_fast/__init__.py": "",
    "benchmarks/__init__.py": "",
    "hunyuan_fast/__main__.py": "from stand_in import main; main()\n",
    "tests/__init__.py": "",
    "tests/native/sm90.cu": "",
    "tests/sanitize.py": "from stand_in import main; main()\n",
    "tests/ops/test_gelu_tanh.py": "@pytest.mark.gpu\n",
    "tests/ops/test_gelu_tanh_faults.py": "",
    "tests/ops/test_causal_conv3d_cuda.py": "@pytest.mark.gpu\n",
    "tests/models/test_dit.py": "@pytest.mark.gpu\n",
    "benchmarks/__main__.py": "from stand_in import main; main()\n",
    "benchmarks/bench_gelu_tanh.py": "",
    "benchmarks/bench_causal_conv3d.py": "",
    "benchmarks/bench_vae.py": "",
    "pytest.py": "from stand_in import main; main('2 passed, 1 skipped in 0.10s')\n",
    "torch.py": (
        "__version__ = '2.11.0'\nclass version: cuda = '13.0'\n"
        "class cuda: is_available = staticmethod(lambda: True)\n"
    ),
    "setup.py": "from stand_in import main; main()\n",
    # does what the first rule says whose words the command line holds
    "stand_in.py": """
import json, pathlib, sys, time
def main(words=""):
    here = pathlib.Path(__file__).parent
    line = " ".join([sys.argv[0].rsplit("/", 1)[-1], *sys.argv[1:]])
    with open(here / "calls", "a") as calls:
        calls.write(line + "\\n")
    for key, rule in json.loads((here / "rules").read_text()).items():
        if key in line:
            words = rule.get("says", words)
            print("working", flush=True)
            time.sleep(rule.get("sleeps", 0))
            print(words)
            sys.exit(rule.get("status", 0))
    print(words)
""",
}
CLEAN = "========= ERROR SUMMARY: 0 errors"
TOOLS = {
    "nvidia-smi": "NVIDIA H200, 9.0",
    "nvcc": "",
    "compute-sanitizer": CLEAN,
}


class Checkout:
    """A tree that ``scripts/gpu.py`` takes for the whole checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in FILES.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        shutil.copytree(
            ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
        )
        (root / "bin").mkdir()
        for name, words in TOOLS.items():
            program = root / "bin" / name
            program.write_text(
                f"#!{sys.executable} -S\nimport sys; sys.path.insert(0, {str(root)!r})\n"
                f"from stand_in import main; main({words!r})\n"
            )
            program.chmod(0o755)
        # what it has compiled must be there to be run
        for name in ("sm90", "sm90_operands", "sm90_probes"):
            probe = root / "runs/gpu/probes" / name
            probe.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "bin/nvcc", probe)
        self.rules({})

    def rules(self, rules: dict[str, dict[str, object]]) -> None:
        (self.root / "rules").write_text(json.dumps(rules))
        (self.root / "calls").write_text("")

    def command(self, *args: str) -> list[str]:
        return [sys.executable, str(self.root / "scripts/gpu.py"), *args]

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**mine, "PATH": f"{self.root / 'bin'}:/usr/bin:/bin"}

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        (self.root / "calls").write_text("")
        return subprocess.run(
            self.command(*args), env=self.environment, capture_output=True, text=True, timeout=60
        )

    def verdicts(self) -> dict[str, str]:
        state = json.loads((self.root / "runs/gpu/state.json").read_text())
        return {name: step["verdict"] for name, step in state["steps"].items()}

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_everything_in_order(checkout: Checkout) -> None:
    done = checkout.run("--pack", str(checkout.root / "packed.tar.gz"))
    # the checkout has no room for attention, so nothing speaks for it
    assert done.returncode == 3 and "2 left" in done.stdout, done.stdout + done.stderr
    found = checkout.verdicts()
    assert next(iter(found)) == "build native"
    assert {name for name in found if name.startswith("probe")} == {
        *("probe sm90", "probe sm90_operands", "probe sm90_probes")
    }
    order = [name for name in found if name.startswith(("test", "bench", "tune"))]
    assert order == [
        *("test gelu_tanh", "test causal_conv3d", "test causal_conv3d cuda", "test wholes"),
        *("bench causal_conv3d", "bench gelu_tanh", "bench vae"),
        *("tune attention", "tune ranking", "tune verified", "tune summary"),
    ]
    assert found["tune attention"] == found["tune ranking"] == "skipped"
    assert {found[name] for name in order[:-4]} == {"green"}
    sanitized = [name.split()[0] for name in found if name.endswith(" causal_conv3d")]
    assert sanitized[1:-1] == ["cases", "memcheck", "racecheck", "synccheck", "initcheck"]
    tests = [line for line in checkout.calls() if line.startswith("pytest")]
    assert all("-m gpu -x" in line and "faults" not in line for line in tests)
    assert "not (cuda_impl" in tests[1] and "-k cuda_impl or" in tests[2]
    line = r"test causal_conv3d cuda +green +\d+ s +2 passed, 1 skipped +logs/"
    assert re.search(line, done.stdout)
    with tarfile.open(checkout.root / "packed.tar.gz") as archive:
        names = archive.getnames()
    assert "run/state.json" in names and "run/logs/test-gelu_tanh.log" in names


def test_a_probe_that_fails_keeps_what_needs_it_from_running(checkout: Checkout) -> None:
    (checkout.root / "runs/gpu/probes/sm90").write_text(
        f"#!{sys.executable} -S\nprint('bulk: (0, 1) is 4, not 5'); raise SystemExit(1)\n"
    )
    done = checkout.run("--stages", "probe,test,sanitize,bench")
    found = checkout.verdicts()
    assert done.returncode == 1
    assert found["probe sm90"] == "red" and found["probe sm90_operands"] == "green"
    assert found["test causal_conv3d"] == found["test gelu_tanh"] == "green"
    assert found["test causal_conv3d cuda"] == found["memcheck causal_conv3d"] == "skipped"
    assert found["bench causal_conv3d"] == "skipped" and found["bench gelu_tanh"] == "green"
    assert "    | bulk: (0, 1) is 4, not 5" in done.stdout
    assert "probe sm90 is red" in done.stdout


def test_a_red_room_does_not_stop_the_others(checkout: Checkout) -> None:
    checkout.rules({"test_gelu_tanh": {"says": "FAILED\n1 failed, 2 passed in 3s", "status": 1}})
    done = checkout.run("--stages", "test,bench")
    found = checkout.verdicts()
    assert done.returncode == 1 and "1 red" in done.stdout
    assert found["test gelu_tanh"] == "red" and found["test wholes"] == "green"
    assert found["bench gelu_tanh"] == "skipped" and found["bench causal_conv3d"] == "green"
    assert "    | FAILED" in done.stdout


def test_only_what_is_left_or_red_or_changed_is_done_again(checkout: Checkout) -> None:
    checkout.rules({"test_gelu_tanh": {"says": "1 failed in 3s", "status": 1}})
    assert checkout.run("--stages", "test").returncode == 1
    checkout.rules({})
    done = checkout.run("--stages", "test", "--resume")
    assert done.returncode == 0
    assert [line for line in checkout.calls() if "pytest" in line and "gelu" not in line] == []
    assert done.stdout.count("green, as before") == 3
    checkout.run("--stages", "test", "--resume")
    assert not [line for line in checkout.calls() if "pytest" in line]

    # the convolution imports from the room of gelu; nothing else does
    (checkout.root / "kernels/gelu_tanh/reference.py").write_text("changed = True\n")
    checkout.run("--stages", "test", "--resume", "--only", "gelu_tanh", "causal_conv3d")
    assert len([line for line in checkout.calls() if "pytest" in line]) == 3
    assert len([line for line in checkout.calls() if "pytest" in line]) == 3
    # what was measured would be of other sources than what was tested
    (checkout.root / "kernels/gelu_tanh/triton_impl.py").write_text("changed = True\n")
    done = checkout.run("--stages", "bench", "--only", "gelu_tanh")
    assert "test gelu_tanh is of other sources" in done.stdout
    checkout.run("--stages", "test", "--only", "wholes")
    assert len([line for line in checkout.calls() if "pytest" in line]) == 1


def test_what_overruns_is_ended_with_its_children(checkout: Checkout) -> None:
    pid = checkout.root / "pid"
    (checkout.root / "pytest.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "print('in the middle', flush=True); time.sleep(60)\n"
    )
    start = time.monotonic()
    done = checkout.run("--stages", "test,bench", "--minutes", "0.03")
    assert time.monotonic() - start < 20
    found = checkout.verdicts()
    assert done.returncode == 3 and "left: go on with --resume" in done.stdout
    assert found["test gelu_tanh"] == "cut off"
    assert set(found.values()) == {"cut off", "not run"}
    assert gone(int(pid.read_text()))
    (checkout.root / "pytest.py").write_text(FILES["pytest.py"])
    assert checkout.run("--stages", "test,bench", "--resume").returncode == 0
    assert set(checkout.verdicts().values()) == {"green"}


def test_a_step_has_a_limit_of_its_own(checkout: Checkout) -> None:
    checkout.rules({"test_gelu_tanh": {"sleeps": 60}})
    steps = checkout.root / "scripts/gpu_run/steps.py"
    steps.write_text(steps.read_text().replace("limit=480", "limit=1"))
    done = checkout.run("--stages", "test")
    found = checkout.verdicts()
    assert found["test gelu_tanh"] == "overran" and found["test causal_conv3d"] == "green"
    assert done.returncode == 1 and "    | working" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_interrupted_says_what_is_known(checkout: Checkout, number: int) -> None:
    checkout.rules({"test_causal": {"sleeps": 60}})
    command = checkout.command("--stages", "test")
    process = subprocess.Popen(
        command, env=checkout.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    calls = checkout.root / "calls"
    while "test_causal" not in calls.read_text():
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 3 and "interrupted" in output
    found = checkout.verdicts()
    assert (found["test gelu_tanh"], found["test causal_conv3d"]) == ("green", "cut off")


def test_a_sanitizer_that_is_informative_fails_nothing(checkout: Checkout) -> None:
    red = {"says": "========= ERROR SUMMARY: 3 errors", "status": 33}
    checkout.rules({"--tool synccheck": red, "--tool memcheck": {"says": CLEAN, "status": 33}})
    done = checkout.run("--stages", "sanitize", "--only", "gelu_tanh")
    found = checkout.verdicts()
    assert done.returncode == 0 and "red (informative)" in done.stdout
    assert (found["synccheck gelu_tanh"], found["memcheck gelu_tanh"]) == ("red", "green")
    checkout.rules({"--tool racecheck": red, "sanitize.py causal": {"status": 1}})
    assert checkout.run("--stages", "sanitize").returncode == 1
    found = checkout.verdicts()
    assert found["racecheck gelu_tanh"] == "red"
    # where results are wrong, or the tool says nothing, it is not asked for more
    assert found["cases causal_conv3d"] == "red"
    assert found["memcheck causal_conv3d"] == "skipped"


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        (0, CLEAN, "green"),
        (33, "========= RACECHECK SUMMARY: 4 hazards displayed (0 errors, 4 warnings)", "green"),
        (33, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "red"),
        (33, "========= ERROR SUMMARY: 1 error", "red"),
        (1, CLEAN, "red"),
        (0, "no summary at all", "red"),
        (255, "========= Error: Device not supported. Please refer to the notes", "cannot"),
    ],
)
def test_what_a_sanitizer_says(status: int, log: str, verdict: str) -> None:
    assert gpu_run("verdicts").of_sanitizer(status, log)[0] == verdict


@pytest.mark.parametrize(
    ("status", "log", "verdict", "note"),
    [
        (0, "3 passed, 1 skipped, 9 deselected in 2.00s", "green", "3 passed, 1 skipped"),
        (1, "1 failed, 2 passed in 2.00s\nleft over", "red", "1 failed, 2 passed"),
        (5, "9 deselected in 0.10s", "nothing ran", "no tests"),
        (0, "4 skipped in 1.00s", "nothing ran", "4 skipped"),
        (1, "2 errors in 1.00s", "red", "2 error"),
        (139, "Segmentation fault", "red", "status 139"),
    ],
)
def test_what_pytest_says(status: int, log: str, verdict: str, note: str) -> None:
    assert gpu_run("verdicts").of_tests(status, log) == (verdict, note)


def test_some_cases_of_benchmarks(checkout: Checkout) -> None:
    none = {"says": "ValueError: --only: no case holds '720p'; there are quick", "status": 1}
    checkout.rules({"__main__.py gelu_tanh": none})
    checkout.run("--stages", "test")
    done = checkout.run("--stages", "bench", "--cases", "720p")
    found = checkout.verdicts()
    assert done.returncode == 0
    assert found["bench gelu_tanh 720p"] == "nothing ran"
    assert found["bench vae 720p"] == "green" and "bench vae" not in found
    assert any("vae --missing --only 720p --tested" in line for line in checkout.calls())


def test_what_was_skipped_has_not_run(checkout: Checkout) -> None:
    checkout.rules({"-k cuda_impl": {"says": "7 skipped, 3 deselected in 1s", "status": 0}})
    done = checkout.run("--stages", "test")
    assert checkout.verdicts()["test causal_conv3d cuda"] == "nothing ran"
    assert done.returncode == 0 and "7 skipped" in done.stdout


def test_tools_that_are_not_there_are_named(checkout: Checkout) -> None:
    (checkout.root / "bin/compute-sanitizer").unlink()
    done = checkout.run("--stages", "sanitize", "--only", "gelu_tanh")
    if "cannot" not in done.stdout:
        pytest.skip("CUDA's own compute-sanitizer is found")
    assert done.returncode == 0 and "compute-sanitizer is not on the path" in done.stdout
    (checkout.root / "bin/nvidia-smi").unlink()
    done = checkout.run()
    assert done.returncode == 2 and "nvidia-smi does not run" in done.stdout


def test_a_torch_without_the_gpu_is_told_before_anything_runs(checkout: Checkout) -> None:
    (checkout.root / "torch.py").write_text(FILES["torch.py"].replace("True", "False"))
    done = checkout.run("--stages", "test,sanitize")
    assert done.returncode == 2 and "torch 2.11.0 for CUDA 13.0 sees no GPU" in done.stdout
    (checkout.root / "torch.py").write_text("raise ImportError('no libcudart')\n")
    assert "cannot ask torch for the GPU: ImportError: no libcudart" in checkout.run().stdout
    assert checkout.run("--stages", "build,probe").returncode == 0


def test_a_module_of_these_sources_is_not_built_again(checkout: Checkout) -> None:
    suffix = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    module = checkout.root / f"hunyuan_fast/_C.{suffix}-x86_64.so"
    module.write_text("no module at all")
    checkout.run("--stages", "build")
    assert any(line.startswith("setup.py") for line in checkout.calls())

    machine, steps = gpu_run("machine"), gpu_run("steps")
    here = machine.Machine(gpu="x", capability="9.0", cores=2, python="python", many=False)
    with pytest.MonkeyPatch.context() as patch:
        built = {"sources": steps.native_sources.digest(checkout.root), "archs": ("80", "90a")}
        patch.setattr(machine, "built_from", lambda _: (built["sources"], built["archs"]))
        build = steps.plan(checkout.root, here, checkout.root)[0]
        assert "is of these sources, for 80, 90a" in build.ready()
        built["archs"] = ("80",)
        assert not build.ready()
        built["archs"] = ("90a",)
        (checkout.root / "csrc/common/new.cuh").write_text("")
        assert not build.ready()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stages", "build,tests"], "no stage tests; there are build, probe"),
        (["--only", "conv"], "no room conv; there are gelu_tanh, causal_conv3d, wholes"),
        (["--minutes", "-3"], "minutes must be a positive number, got '-3'"),
    ],
)
def test_bad_usage(checkout: Checkout, args: list[str], words: str) -> None:
    done = checkout.run(*args)
    assert done.returncode == 2 and words in done.stderr


def test_a_damaged_state_is_refused(checkout: Checkout) -> None:
    (checkout.root / "runs/gpu/state.json").write_text('{"steps": {"a": 1}}')
    done = checkout.run("--stages", "build")
    assert done.returncode == 1 and "is no state of an earlier run" in done.stderr


def test_every_test_that_needs_a_gpu_is_in_one_step() -> None:
    """Of the real checkout."""
    code = (
        "import json, pathlib, sys; sys.path.insert(0, 'scripts')\n"
        "from gpu_run.machine import Machine; from gpu_run.steps import plan\n"
        "here = Machine(gpu='x', capability='9.0', cores=2, python='python', many=True)\n"
        "steps = plan(pathlib.Path().resolve(), here, pathlib.Path('runs'))\n"
        "print(json.dumps([[s.name, s.stage, s.commands[-1], s.inputs] for s in steps]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    steps = json.loads(done.stdout)
    tests = {name: command for name, stage, command, _ in steps if stage == "test"}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = str(path.relative_to(ROOT))
        if "pytest.mark.gpu" not in path.read_text():
            continue
        holding = {name.removesuffix(" cuda") for name, c in tests.items() if file in c}
        assert len(holding) == 1, (file, holding)
    names = [name for name, *_ in steps]
    assert len(set(names)) == len(names)
    for op in ("rope3d_attention", "vae", "dit_blocks"):
        assert f"bench {op}" in names
    for name, _, _, inputs in steps:
        for file in inputs:
            if not file.startswith("csrc/"):
                assert (ROOT / file).exists(), (name, file)


def gpu_run(module: str) -> ModuleType:
    """A module of the real script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return import_module(f"gpu_run.{module}")


def gone(pid: int) -> bool:
    """Whether a process has ended, or does so soon."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
