"""Kernels for Hopper on a machine without a GPU: their real sources, compiled for the host.

``tests/native/hopper`` emulates the machine. A driver, a small ``.cpp`` file, includes a kernel and
has functions with C linkage that call its launcher and return ``hopper::attempt(...)``: null, or
what went wrong. ``build`` compiles it; ``Kernels.run`` calls one of its functions.
"""

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.kit.native import ROOT

MACHINE = ROOT / "tests/native/hopper"
# Asynchronous work is done late, early, and late and early by turns; at random for greater seeds.
EXTREMES = range(4)
_PAGE = mmap.PAGESIZE
_POISON = 0xFF  # two of them are a NaN in bf16 and fp16, four in fp32
_NO_ACCESS, _READ_WRITE = 0, 3

Argument = Tensor | None | int | float | Sequence[int]


class HopperFault(AssertionError):
    """A kernel did what Hopper forbids, or what would not end there."""


def compiler() -> str | None:
    """The C++ compiler, or ``None`` when the machine has none."""
    return os.environ.get("CXX") or shutil.which("c++")


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="hopper")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory] = []  # until the process ends


def _compile(source: Path, target: Path, includes: Sequence[Path], *flags: str) -> Path:
    if target.exists():
        return target
    fixed = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-U_FORTIFY_SOURCE", "-w", *flags]
    include = [f"-I{path}" for path in includes]
    command = [compiler(), *fixed, *include, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[:4000]}")
    return target


@cache
def _machine() -> Path:
    """The emulator, compiled once; as one file, since what its files include takes longest."""
    sources = sorted((MACHINE / "machine").glob("*.cpp"))
    whole = _folder() / "machine.cpp"
    whole.write_text("".join(f'#include "{source}"\n' for source in sources))
    # products are loops over numbers
    return _compile(whole, _folder() / "machine.o", [MACHINE, ROOT / "csrc"], "-c", "-O3")


@cache
def build(driver: Path, headers: Path = ROOT / "csrc") -> "Kernels":
    """Compile a driver with the kernels in a folder of headers, once in a session.

    Raises RuntimeError with the compiler's words when it does not compile.
    """
    name = hashlib.sha256(f"{driver} {headers}".encode()).hexdigest()[:16]
    includes = [MACHINE, headers]
    target = _compile(driver, _folder() / f"{name}.o", includes, "-c")
    library = _folder() / f"{name}.so"
    command = [compiler(), "-shared", str(target), str(_machine()), "-o", str(library)]
    subprocess.run(command, check=True)
    return Kernels(library)


class Kernels:
    """The functions of a driver, on the emulated machine."""

    def __init__(self, library: Path) -> None:
        self._native = ctypes.CDLL(str(library))
        self._native.hopper_allow.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._native.hopper_prepare.argtypes = (ctypes.c_uint64, ctypes.c_int)

    def run(self, function: str, *arguments: Argument, seed: int = 0, processors: int = 3) -> None:
        """Call a function; tensors are pointers to it, and hold its results afterwards.

        They are copied to memory between pages that nobody may touch. ``seed`` decides when
        asynchronous work is done and who runs when.
        Raises HopperFault with what went wrong.
        """
        entry = getattr(self._native, function)
        entry.restype = ctypes.c_char_p
        self._native.hopper_prepare(seed, processors)
        guarded: dict[int, _Guarded] = {}
        for tensor in (a for a in arguments if isinstance(a, Tensor) and a.numel()):
            guarded[id(tensor)] = guard = _Guarded(tensor)
            self._native.hopper_allow(guard.begin, guard.bytes)
        complaint = entry(*(self._converted(a, guarded) for a in arguments))
        if complaint is not None:
            raise HopperFault(complaint.decode())
        for guard in guarded.values():
            guard.bring_back()

    @staticmethod
    def _converted(argument: Argument, guarded: dict[int, "_Guarded"]) -> object:
        if argument is None or isinstance(argument, Tensor):
            guard = guarded.get(id(argument))
            return ctypes.c_void_p(None if guard is None else guard.pointer)
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        return (ctypes.c_int64 * len(argument))(*argument)


class _Guarded:
    """A copy of a tensor that ends where a page begins that nobody may touch."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        size = tensor.element_size()
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.bytes = (reach + 1) * size
        # as far from a multiple of 16 as the tensor is: what is after it is then less than 16 bytes
        after = -(tensor.data_ptr() + self.bytes) % 16
        self._room = -(-(self.bytes + after) // _PAGE) * _PAGE
        self._memory = mmap.mmap(-1, self._room + 2 * _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for page in (start, start + _PAGE + self._room):
            _protect(page, _NO_ACCESS)
        self._offset = _PAGE + self._room - after - self.bytes
        self.begin = self.pointer = start + self._offset
        self._bytes = torch.frombuffer(
            self._memory, dtype=torch.uint8, offset=_PAGE, count=self._room
        )
        self._bytes.fill_(_POISON)
        elements = self._own(self._bytes).view(tensor.dtype)
        self._view = elements.as_strided(tensor.shape, tensor.stride())
        self._view.copy_(tensor)

    def _own(self, room: Tensor) -> Tensor:
        return room[self._offset - _PAGE :][: self.bytes]

    def bring_back(self) -> None:
        """Give the tensor its results; raises HopperFault where bytes beside it were written."""
        inside = torch.zeros(self.bytes // self._tensor.element_size(), dtype=torch.bool)
        inside.as_strided(self._tensor.shape, self._tensor.stride()).fill_(True)
        outside = torch.ones(self._room, dtype=torch.bool)
        self._own(outside)[inside.repeat_interleave(self._tensor.element_size())] = False
        if (self._bytes[outside] != _POISON).any():
            shape = tuple(self._tensor.shape)
            raise HopperFault(f"bytes between or beside the rows of a tensor {shape} were written")
        self._tensor.copy_(self._view)


def one_kernel(folder: Path, header: str, every: str, one: str) -> Path:
    """A copy of all sources in which a header makes one kernel in place of all: soon compiled.

    every: the beginning of what makes them all, to the end of its function; one: what is there then
    """
    headers = shutil.copytree(ROOT / "csrc", folder / "csrc")
    text = (headers / header).read_text()
    assert text.count(every) == 1, f"{every} stands {text.count(every)} times in {header}"
    first = text.index(every)
    (headers / header).write_text(text[:first] + one + text[text.index("}\n", first) :])
    return headers


def _protect(page: int, access: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), access):
        raise OSError(ctypes.get_errno(), "mprotect refused a page")
