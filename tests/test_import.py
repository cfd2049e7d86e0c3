"""Importing starts no CUDA, loads torch at most, and needs neither the native module nor Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Runs first in a fresh interpreter, where the given modules are as if they were not installed.
PRELUDE = """
import sys
import torch
for name in %r:
    assert name not in sys.modules, name
    sys.modules[name] = None
def never(*args, **kwargs):
    raise AssertionError("CUDA was started")
torch.cuda._lazy_init = torch._C._cuda_init = never
"""
FORBIDDEN = {"torchvision", "torchaudio", "torchcodec", "timm", "lpips", "open_clip"}
OPTIONAL = {"triton", "diffusers", "matplotlib", "tensorboard", "accelerate"}


def run(code: str, blocked: set[str] = frozenset()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE % set(blocked) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(code: str, blocked: set[str] = frozenset()) -> str:
    result = run(code, blocked)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_torch_at_most():
    before_and_after = """
before = set(sys.modules)
import hunyuan_fast
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded - set(sys.stdlib_module_names)))
"""
    assert output(before_and_after).split() == ["hunyuan_fast"]


def test_importing_takes_no_time_beside_torch():
    code = """
import time
start = time.perf_counter()
import hunyuan_fast
print(time.perf_counter() - start)
"""
    assert min(float(output(code)) for _ in range(2)) < 0.2


def test_every_module_can_be_imported_without_cuda_and_optional_packages():
    """No module on the way of ``generate`` starts CUDA or needs what the core does not bring."""
    code = """
import importlib, pathlib
import hunyuan_fast
root = pathlib.Path(hunyuan_fast.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(["hunyuan_fast", *path.relative_to(root).with_suffix("").parts])
    name = name.removesuffix(".__init__")
    if name != "hunyuan_fast.__main__":
        importlib.import_module(name)
        print(name)
"""
    names = output(code, FORBIDDEN | OPTIONAL | {"hunyuan_fast._C"}).split()
    assert {"hunyuan_fast.dispatch", "hunyuan_fast.models", "hunyuan_fast.cli"} <= set(names)


@pytest.mark.parametrize(
    "blocked",
    [{"hunyuan_fast._C"}, {"triton"}, {"hunyuan_fast._C", "triton"}],
    ids=["no native module", "no triton", "neither"],
)
def test_ops_answer_without_native_module_and_triton(blocked):
    code = """
import hunyuan_fast
from hunyuan_fast.ops.fused_modulation import layer_norm_modulate
from hunyuan_fast.ops.rope3d_attention import attention
x, row = torch.randn(2, 5, 64), torch.zeros(2, 64)
torch.testing.assert_close(layer_norm_modulate(x, row, row), torch.layer_norm(x, (64,), eps=1e-6))
q = torch.randn(1, 4, 2, 16)
expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
torch.testing.assert_close(attention(q, q, q), expected.transpose(1, 2))
print(hunyuan_fast.report())
"""
    result = run(code, blocked)
    assert result.returncode == 0, result.stderr
    for name in blocked:
        assert f"{name} is not" in result.stdout
    # said once, when the first op runs, and not at all when nothing native is missing
    assert result.stderr.count("hunyuan_fast._C is not built") == ("hunyuan_fast._C" in blocked)


def test_importing_does_not_speak_of_the_native_module():
    result = run("import hunyuan_fast, hunyuan_fast.dispatch", {"hunyuan_fast._C"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_unknown_attribute_is_an_attribute_error():
    result = run("import hunyuan_fast; hunyuan_fast.HunyuanVidoePipeline")
    assert "AttributeError: module 'hunyuan_fast' has no attribute 'HunyuanVidoe" in result.stderr


def test_every_public_name_can_be_had():
    code = """
import hunyuan_fast
for name in hunyuan_fast.__all__:
    assert getattr(hunyuan_fast, name) is not None and name in dir(hunyuan_fast), name
print(hunyuan_fast.__version__)
"""
    assert output(code).strip()
