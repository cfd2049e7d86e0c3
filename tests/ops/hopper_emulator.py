"""The native functions of ``causal_conv3d.cuda_impl`` on a machine without a GPU.

``tests/native/hopper_conv3d.cpp`` does what the thread blocks do, with the kernel's own index
functions; here it is compiled and put in the place of ``hunyuan_fast._C``. bf16, on the CPU.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kit import hopper
from tests.kit.native import ROOT

_SPANS = 27
_NO_STRIDES = (0, 0, 0, 0)


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++")


def library(folder: Path, headers: Path = ROOT / "csrc") -> ctypes.CDLL:
    """The emulator, compiled into a folder with the index functions of those headers."""
    target = folder / "hopper_conv3d.so"
    warnings = ["-Wall", "-Wextra", "-Werror"] if headers == ROOT / "csrc" else ["-w"]
    flags = ["-std=c++17", "-O2", *warnings, f"-I{headers}"]
    sources = [ROOT / "tests/native" / name for name in ("hopper_conv3d.cpp", "hopper_ring.cpp")]
    subprocess.run([compiler(), *flags, "-shared", "-fPIC", *sources, "-o", target], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.packed_elements.restype = ctypes.c_int64
    for function in (loaded.pack, loaded.forward, loaded.bank_conflicts, loaded.ring):
        function.restype = ctypes.c_char_p
    return loaded


def check(complaint: bytes | None) -> None:
    if complaint is not None:
        raise AssertionError(complaint.decode())


class Emulator:
    """What ``_C`` has of the Hopper kernels."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self._native = native
        self.launches = 0

    def causal_conv3d_packed_size_hopper(self, O: int, C: int, taps: Sequence[int]) -> int:
        return self._native.packed_elements(O, C, *taps)

    def causal_conv3d_pack_hopper(
        self, weight: Tensor, spans: Sequence[Sequence[tuple[int, int]]], packed: Tensor, _: int
    ) -> None:
        taps = [len(axis) for axis in spans]
        assert packed.numel() == self.causal_conv3d_packed_size_hopper(*weight.shape[:2], taps)
        numbers = [*weight.shape[:2], *weight.stride(), *taps]
        for axis in spans:
            for side in (0, 1):
                ends = [span[side] for span in axis]
                numbers += ends + [0] * (_SPANS - len(ends))
        self._pack(weight, packed, numbers)

    def causal_conv3d_forward_hopper(
        self,
        x: Tensor,
        past: Tensor | None,
        packed: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        origin: Sequence[int],
        _: int,
    ) -> None:
        self.launches += 1
        frames = 0 if past is None else past.shape[2]
        numbers = [*x.shape[:2], y.shape[1], frames, *x.shape[2:], *y.shape[2:]]
        numbers += [*kernel, *stride, *origin]
        for t in (x, past, y, residual):
            numbers += _NO_STRIDES if t is None else (t.stride(0), *t.stride()[2:])
        tensors = (x, past, y, residual, packed, bias)
        for t in tensors[:4]:
            assert t is None or t.stride(1) == 1
        self._forward(tensors, numbers)

    def _pack(self, weight: Tensor, packed: Tensor, numbers: list[int]) -> None:
        check(self._native.pack(_pointer(weight), _pointer(packed), _numbers(numbers)))

    def _forward(self, tensors: Sequence[Tensor | None], numbers: list[int]) -> None:
        pointers = (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in tensors))
        check(self._native.forward(pointers, _numbers(numbers)))


class RealSources(Emulator):
    """The same by the kernels' own sources, on the emulated machine."""

    def __init__(self, native: ctypes.CDLL, headers: Path = ROOT / "csrc") -> None:
        super().__init__(native)
        self._kernels = hopper.build(ROOT / "tests/native/hopper_causal_conv3d.cpp", headers)
        self.seed = 0

    def _pack(self, weight: Tensor, packed: Tensor, numbers: list[int]) -> None:
        self._kernels.run("pack", weight, packed, numbers, seed=self.seed)

    def _forward(self, tensors: Sequence[Tensor | None], numbers: list[int]) -> None:
        self._kernels.run("forward", *tensors, numbers, seed=self.seed)


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _numbers(numbers: Sequence[int]) -> object:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return library(tmp_path_factory.mktemp("hopper"))


@pytest.fixture
def emulated(native: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """``cuda_impl`` computes on the CPU, by the emulator."""
    return emulate(native, monkeypatch)


@pytest.fixture
def real_sources(native: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> RealSources:
    """The same, by the kernels' own sources."""
    kernels = RealSources(native)
    install(kernels, monkeypatch)
    return kernels


def emulate(native: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(native)
    install(emulator, monkeypatch)
    return emulator


def install(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the place of the native module."""
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    from hunyuan_fast.kernels.causal_conv3d import cuda_impl

    monkeypatch.setattr(cuda_impl, "_C", emulator)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
