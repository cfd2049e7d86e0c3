"""Three ways to install: with a compiler, without one, and as built distributions."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.install import compile_once
from tests.install.environments import (
    Environment,
    borrowed_packages,
    copy_of_the_checkout,
    run,
)

pytestmark = pytest.mark.install

HERE = "import hunyuan_fast, sys; assert hunyuan_fast.__file__.startswith(sys.prefix)\n"
# Two ops against plain torch, called twice, and who answered them.
OPS = (
    HERE
    + """
import torch
from hunyuan_fast.ops.fused_modulation import layer_norm_modulate
from hunyuan_fast.ops.rope3d_attention import attention
for _ in range(2):
    x, row = torch.randn(2, 5, 64), torch.randn(2, 64)
    expected = torch.layer_norm(x, (64,), eps=1e-6) * (1 + row[:, None]) + row[:, None]
    torch.testing.assert_close(layer_norm_modulate(x, row, row), expected)
    q = torch.randn(1, 4, 2, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
    torch.testing.assert_close(attention(q, q, q), expected.transpose(1, 2))
print("rooms:", *hunyuan_fast.report().reasons)
print("modulation:", hunyuan_fast.report().answering("fused_modulation", "cpu"))
"""
)
NATIVE = HERE + "from hunyuan_fast import _C; print(_C.has_cuda, *_C.cuda_archs)"


@pytest.fixture(scope="module", autouse=True)
def _sources_are_compiled_once(tmp_path_factory) -> Iterator[None]:
    """Every build runs CMake, and the compiler where it has not seen a source yet."""
    launcher = (sys.executable, compile_once.__file__, tmp_path_factory.mktemp("compiled"))
    argument = f"-DCMAKE_CXX_COMPILER_LAUNCHER={';'.join(map(str, launcher))}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_ARGS", f"{os.environ.get('CMAKE_ARGS', '')} '{argument}'")
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_of_the_checkout(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory) -> Path:
    return borrowed_packages(tmp_path_factory.mktemp("borrowed") / "site")


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, checkout])
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, in an environment of pip's own making that has no torch."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, sdist])
    return next(out.glob("*.whl"))


def test_with_a_compiler(checkout, borrowed, tmp_path):
    env = Environment(tmp_path / "env", borrowed)
    arguments = ("install", "--no-build-isolation", "--no-deps", checkout)
    env.pip(*arguments, HUNYUAN_FAST_BUILD="cpu", HUNYUAN_FAST_REQUIRE_EXT="cpu")

    assert env.python(NATIVE).stdout.strip() == "False"
    result = env.python(OPS)
    assert result.returncode == 0, result.stderr
    assert "not built" not in result.stderr


def test_without_a_compiler(checkout, borrowed, tmp_path):
    env = Environment(tmp_path / "env", borrowed)
    arguments = ("install", "-v", "--no-build-isolation", "--no-deps", checkout)
    said = env.pip(*arguments, CXX="/bin/false", CC="/bin/false")
    assert "installing without native kernels" in said

    assert "ImportError" in env.python(NATIVE).stderr
    result = env.python(OPS)
    assert result.returncode == 0, result.stderr
    assert "modulation: reference" in result.stdout
    assert result.stderr.count("hunyuan_fast._C is not built") == 1


def test_a_missing_compiler_can_be_made_fatal(checkout, borrowed, tmp_path):
    env = Environment(tmp_path / "env", borrowed)
    with pytest.raises(AssertionError, match="HUNYUAN_FAST_REQUIRE_EXT=cpu"):
        env.pip(
            *("install", "--no-build-isolation", "--no-deps", checkout),
            CXX="/bin/false",
            CC="/bin/false",
            HUNYUAN_FAST_REQUIRE_EXT="cpu",
        )
    assert not list(env.site.glob("hunyuan_fast*"))


def test_the_sdist_holds_what_a_build_needs(sdist, checkout):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    for wing in ("csrc", "kernels", "hunyuan_fast"):
        files = (path for path in (checkout / wing).rglob("*") if path.is_file())
        needed |= {str(path.relative_to(checkout)) for path in files}
    assert needed - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_and_no_other_name(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hunyuan_fast"}

    sources = [*checkout.glob("kernels/**/*.py"), *checkout.glob("hunyuan_fast/**/*.py")]
    needed = {str(path.relative_to(checkout)) for path in sources}
    needed = {f"hunyuan_fast/{name}" if name.startswith("kernels/") else name for name in needed}
    assets = {path for path in checkout.glob("hunyuan_fast/assets/nano/**/*") if path.is_file()}
    assert sum(path.suffix == ".safetensors" for path in assets) == 4  # one per part of the model
    needed |= {str(path.relative_to(checkout)) for path in assets} | {"hunyuan_fast/py.typed"}
    assert needed - names == set()


def test_the_wheel_works_in_a_clean_environment(wheel, borrowed, tmp_path):
    env = Environment(tmp_path / "env", borrowed)
    env.pip("install", wheel)  # with its dependencies: all of them must be satisfiable

    result = env.python(OPS)
    assert result.returncode == 0, result.stderr
    assert "not built" not in result.stderr
    assert "generate" in env.command("hunyuan-fast", "--help")
    assert "generate" in env.command("python", "-m", "hunyuan_fast", "--help")

    video = tmp_path / "out.mp4"
    words = ("generate", "a red circle moving right", "-o", video, "--steps", "2")
    env.command("hunyuan-fast", *words)
    assert video.stat().st_size > 1000


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_the_wheel_holds_cuda_code_where_nvcc_is(wheel, borrowed, tmp_path):
    """CUDA code for both architectures, in a module that loads on any machine."""
    env = Environment(tmp_path / "env", borrowed)
    env.pip("install", "--no-deps", wheel)
    assert env.python(NATIVE).stdout.split() == ["True", "80", "90a"]

    (module,) = env.site.glob("hunyuan_fast/_C*.so")
    backends = pytest.importorskip("triton.backends.nvidia", reason="no cuobjdump")
    cuobjdump = Path(backends.__path__[0]) / "bin/cuobjdump"
    listing = run([cuobjdump, "--list-elf", module])
    assert "sm_80.cubin" in listing
    assert "sm_90a.cubin" in listing


def test_the_sdist_installs_by_itself(sdist, borrowed, tmp_path):
    """As a user without a wheel for their machine would do it."""
    env = Environment(tmp_path / "env", borrowed)
    env.pip("install", "--no-deps", sdist, HUNYUAN_FAST_BUILD="cpu", HUNYUAN_FAST_REQUIRE_EXT="cpu")
    result = env.python(OPS)
    assert result.returncode == 0, result.stderr
    assert "not built" not in result.stderr
