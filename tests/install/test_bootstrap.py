"""The setup behind the Makefile: its steps, the torch it chooses, what makes it run again."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = "setuptools>=77"


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script over an empty project, with its slow steps written down instead of done."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts/bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "csrc/op/api.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "hunyuan_fast").mkdir()
    module.calls = []

    def create_environment() -> None:
        module.calls.append("create")
        (tmp_path / ".venv").mkdir(exist_ok=True)

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv/bootstrap.json")
    monkeypatch.setattr(module, "create_environment", create_environment)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "has_cpu_torch", lambda: False)
    monkeypatch.setattr(module, "pip", lambda *args: module.calls.append(args))
    monkeypatch.setattr(module, "try_pip", lambda *args: module.calls.append(args) or True)
    return module


def run(bootstrap, monkeypatch, *args: str) -> list[object]:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", *args])
    bootstrap.calls.clear()
    bootstrap.main()
    return list(bootstrap.calls)


def test_the_first_run_does_everything_and_the_second_nothing(bootstrap, monkeypatch, capsys):
    create, torch, tools, package = run(bootstrap, monkeypatch)
    assert create == "create"
    assert torch == ("install", "torch==2.13.0+cpu")
    assert TOOLS in tools
    assert package[-2:] == ("--editable", str(bootstrap.ROOT))
    assert len(capsys.readouterr().out.splitlines()) == 4

    assert run(bootstrap, monkeypatch) == []


def test_indexes_without_the_cpu_build_are_passed_over(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "try_pip", lambda *args: bootstrap.calls.append(args))
    _, *tries, _, _ = run(bootstrap, monkeypatch)
    url = "https://download.pytorch.org/whl/cpu"
    assert tries == [
        ("install", "torch==2.13.0+cpu"),
        ("install", "torch==2.13.0+cpu", "--index-url", url),
        ("install", "torch==2.13.0"),
    ]
    assert capsys.readouterr().out.count(f"trying {url}") == 1
    assert run(bootstrap, monkeypatch) == []


def test_a_suitable_torch_is_kept(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_cpu_torch", lambda: True)
    assert not [call for call in run(bootstrap, monkeypatch) if "torch==" in str(call)]


@pytest.mark.parametrize("text", ["", '{"python": ', "[]", "\xff"])
def test_a_broken_stamp_starts_over(bootstrap, monkeypatch, text):
    run(bootstrap, monkeypatch)
    bootstrap.STAMP.write_bytes(text.encode("latin-1"))
    assert run(bootstrap, monkeypatch)[0] == "create"
    assert sorted(path.name for path in bootstrap.VENV.iterdir()) == ["bootstrap.json"]


def test_the_extra_is_added_once_and_not_taken_away(bootstrap, monkeypatch):
    run(bootstrap, monkeypatch)
    (_, package) = run(bootstrap, monkeypatch, "--extra", "dev")
    assert package[-1] == f"{bootstrap.ROOT}[dev]"
    assert run(bootstrap, monkeypatch, "--extra", "dev") == []
    assert run(bootstrap, monkeypatch) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "csrc/op/api.cpp", "csrc/new.cu"])
def test_a_changed_source_installs_the_package_again(bootstrap, monkeypatch, name):
    run(bootstrap, monkeypatch)
    (bootstrap.ROOT / name).write_text("changed")
    tools, package = run(bootstrap, monkeypatch)
    assert (TOOLS in tools, package[-1]) == (True, str(bootstrap.ROOT))


def test_a_lost_native_module_is_built_again(bootstrap, monkeypatch):
    module = bootstrap.ROOT / "hunyuan_fast/_C.so"
    module.write_text("native")
    run(bootstrap, monkeypatch)
    module.unlink()
    assert len(run(bootstrap, monkeypatch)) == 2


def test_another_python_starts_over(bootstrap, monkeypatch):
    run(bootstrap, monkeypatch)
    monkeypatch.setattr(sys, "executable", "/elsewhere/python")
    assert run(bootstrap, monkeypatch)[0] == "create"


def test_an_interrupted_setup_goes_on_where_it_stopped(bootstrap, monkeypatch):
    def interrupted(*args: str) -> None:
        if "--editable" in args:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bootstrap, "pip", interrupted)
        run(bootstrap, patch)
    tools, _ = run(bootstrap, monkeypatch)
    assert TOOLS in tools


def test_a_gpu_without_torch_gets_the_default_build(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    monkeypatch.setattr(bootstrap, "FIND_CUDA_TORCH", "raise SystemExit(1)")
    assert ("install", "torch>=2.10") in run(bootstrap, monkeypatch)


def test_a_gpu_with_torch_keeps_it(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    monkeypatch.setattr(bootstrap, "FIND_CUDA_TORCH", "print('/opt/torch/site-packages')")
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **options: f"{tmp_path}\n")
    calls = run(bootstrap, monkeypatch)
    assert not [call for call in calls if "torch>=2.10" in call or "torch==" in str(call)]
    link = tmp_path / "torch_of_the_system.pth"
    assert link.read_text() == "/opt/torch/site-packages\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n", True),
        ("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk'; exit 9\n", False),
        ("#!/bin/sh\nexit 0\n", False),
        (None, False),
    ],
)
def test_a_gpu_counts_only_when_its_driver_lists_it(monkeypatch, tmp_path, program, expected):
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts/bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if program is not None:
        (tmp_path / "nvidia-smi").write_text(program)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert module.has_gpu() is expected


@pytest.mark.parametrize(
    ("torch_list", "cmake_list"),
    [("8.0;9.0a", "80-real;90a-real"), ("8.0 9.0a+PTX", "80-real;90a"), ("10.0+PTX", "100")],
)
def test_torch_s_list_of_architectures_is_understood(torch_list, cmake_list):
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = "cuda_architectures"
    (function,) = (node for node in tree.body if getattr(node, "name", None) == wanted)
    names: dict[str, object] = {}
    exec(compile(ast.Module([function], []), "setup.py", "exec"), names)
    assert names[wanted](torch_list) == cmake_list


@pytest.mark.parametrize("name", ["HUNYUAN_FAST_BUILD", "HUNYUAN_FAST_REQUIRE_EXT"])
def test_a_mistyped_build_variable_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "gpu")
    result = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            tmp_path,
            "--build-temp",
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert f"{name} must be one of " in result.stderr
    assert "got 'gpu'" in result.stderr
