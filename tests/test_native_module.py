"""The native module as built here, and the C++ that every op shares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ISAS = ["plain", "avx2", "avx512"]


@pytest.fixture(scope="module")
def native():
    return pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")


def cpu_isa(**env: str) -> subprocess.CompletedProcess[str]:
    code = "import hunyuan_fast._C as native; print(native.cpu_isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_the_module_says_how_it_was_built(native):
    assert isinstance(native.has_cuda, bool)
    assert bool(native.cuda_archs) == native.has_cuda
    assert all(isinstance(arch, str) and arch[0].isdigit() for arch in native.cuda_archs)
    assert "CUDA" in native.build_info
    assert native.sources == "unknown" or len(native.sources) == 16


def test_the_module_needs_only_the_system(native):
    """No CUDA, OpenMP or torch library: it must load where none of them is."""
    listing = subprocess.run(["ldd", native.__file__], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("ldd cannot read it here")
    needed = {line.split()[0].split("/")[-1] for line in listing.stdout.splitlines()}
    system = ("linux-vdso", "ld-linux", "libstdc++", "libgcc_s", "libc.", "libm.", "libpthread")
    assert [name for name in needed if not name.startswith((*system, "libdl.", "librt."))] == []


def test_a_lower_instruction_set_can_be_asked_for(native):
    best = cpu_isa(HUNYUAN_FAST_CPU_ISA="").stdout.strip()
    assert best == native.cpu_isa()
    for isa in ISAS:
        expected = ISAS[min(ISAS.index(isa), ISAS.index(best))]
        assert cpu_isa(HUNYUAN_FAST_CPU_ISA=isa).stdout.strip() == expected


def test_the_instruction_set_is_one_that_torch_sees_too(native):
    """torch asks the same processor independently."""
    capability = torch.backends.cpu.get_cpu_capability()
    if native.cpu_isa() == "avx512":
        assert capability == "AVX512"
    elif capability in ("AVX2", "AVX512"):
        assert native.cpu_isa() != "plain" or os.environ.get("HUNYUAN_FAST_CPU_ISA") == "plain"


def test_an_unknown_instruction_set_is_refused(native):
    result = cpu_isa(HUNYUAN_FAST_CPU_ISA="sse9")
    assert "ValueError: HUNYUAN_FAST_CPU_ISA must be plain, avx2" in result.stderr
    assert "got sse9" in result.stderr


def test_parallel_for_covers_every_range_once(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "parallel"
    sources = [ROOT / "tests/native/parallel.cpp", ROOT / "csrc/common/parallel.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "-pthread"]
    subprocess.run([compiler, *flags, *sources, "-ldl", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("ok\n", 0)
