"""A test of the tests: faults planted in the C++ backward itself must be seen by the rules."""

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hunyuan_fast.kernels.sliding_tile_attention import reference
from tests.kit.emulation import FlashAttention
from tests.kit.hopper import compiler
from tests.kit.native import ROOT
from tests.ops.sliding_tile_attention_cases import Call, Emulated, draw_call, judge

SOURCES = (
    *(f"common/{name}.cpp" for name in ("cpu_isa", "parallel", "tensor_view")),
    *(f"rope3d_attention/{name}.cpp" for name in ("cpu", "cpu_lanes", "cpu_layout", "cpu_plain")),
    *(f"sliding_tile_attention/{name}.cpp" for name in ("cpu", "pattern")),
)
KERNELS = "rope3d_attention/cpu_backward.h"
LAYOUT = "rope3d_attention/cpu_layout.cpp"
PATTERN = "sliding_tile_attention/pattern.cpp"
COMPILED_WITH = {KERNELS: "rope3d_attention/cpu_plain.cpp"}
# name: file, what stands there, what stands there instead
FAULTS = {
    "keys give to what they see": (
        PATTERN,
        "spans[last].seen.first > begin) --last",
        "spans[last].own.first > begin) --last",
    ),
    "keys of other spans are taken for the same": (PATTERN, " && found.back().last == last", ""),
    "keys forget the spans before the last": (PATTERN, "size_t l = w.first;", "size_t l = w.last;"),
    "text does not see the video": (PATTERN, "number < groups_of_text", "number < 0"),
    "text is seen by itself alone": (
        PATTERN,
        "number < result.queries.size(); ++number) text",
        "number < 1; ++number) text",
    ),
    "a chunk overlaps the next": (LAYOUT, "filled_ += rows;", "filled_ += 8;"),
    "the last keys of a group are left out": (LAYOUT, "first < count;", "first + each <= count;"),
    "dq is finished before the last chunk": (KERNELS, "visit.turn + 1 ==", "visit.turn + 2 =="),
    "what earlier chunks gave is lost": (KERNELS, "if (!is_first) sum +=", "if (is_first) sum +="),
    "the last chunk does not scale dq": (KERNELS, "sum * p.scale, D - d", "sum, D - d"),
    "dq of the last segment alone": (KERNELS, "        before = Before::added;\n", ""),
    "segments that begin late are added": (KERNELS, "begun >> number & 1", "begun"),
    "segments begin at every tile": (KERNELS, "begun >> number & 1", "begun >> number & 0"),
    "lower halves of other tokens": (KERNELS, "queries[i] * room.columns", "i * room.columns"),
    "lower halves are lost": (KERNELS, "narrow(bits & 0xffffu)", "narrow(bits & 0x0u)"),
    "delta by the place in the tile": (KERNELS, "delta[queries[i]] =", "delta[i] ="),
    "log-sum-exps of the first tokens": (KERNELS, "lse[queries[i]]", "lse[i]"),
    "dk of the keys beside": (
        KERNELS,
        "tokens_of<T>(p.dk, chunk.b, chunk.n, segment.keys, D)",
        "tokens_of<T>(p.dk, chunk.b, chunk.n, Places{segment.keys[0], segment.keys.count}, D)",
    ),
    "values of the first segment": (
        KERNELS,
        "room.packed(room.v, segment), words",
        "room.v, words",
    ),
}

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


class Native:
    """The backward, compiled here, with or without a fault."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._objects = {name: self._compile(ROOT / "csrc" / name) for name in SOURCES}
        self._driver = self._compile(ROOT / "tests/native/sliding_tiles.cpp")

    def library(self, fault: str | None = None) -> ctypes.CDLL:
        objects = dict(self._objects)
        if fault:
            name, old, new = FAULTS[fault]
            source = (ROOT / "csrc" / name).read_text()
            assert source.count(old) >= 1, f"{name} has no {old!r} any more"
            overlay = self._folder / fault.replace(" ", "_")
            changed = overlay / name
            changed.parent.mkdir(parents=True)
            changed.write_text(source.replace(old, new))
            compiled = COMPILED_WITH.get(name, name)
            plain = changed if compiled == name else ROOT / "csrc" / compiled
            objects[compiled] = self._compile(plain, overlay)
        target = self._folder / f"{fault or 'right'}.so"
        flags = ["-shared", "-pthread", "-Wl,-Bsymbolic"]
        given = [str(compiler()), *flags, *objects.values(), self._driver, "-ldl", "-o", target]
        subprocess.run(given, check=True)
        return ctypes.CDLL(str(target))

    def _compile(self, source: Path, *overlays: Path) -> Path:
        folder = overlays[0] if overlays else self._folder
        target = folder / f"{source.parent.name}_{source.stem}.o"
        includes = [f"-I{path}" for path in (*overlays, ROOT / "csrc")]
        flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-c"]
        subprocess.run([str(compiler()), *flags, *includes, source, "-o", target], check=True)
        return target


@pytest.fixture(scope="module")
def native() -> Iterator[Native]:
    with tempfile.TemporaryDirectory() as folder:
        yield Native(Path(folder))


def run(library: ctypes.CDLL, dtype: torch.dtype, threads: int = 1) -> list[Tensor]:
    """out and lse as others found them, dq, dk, dv."""
    call = drawn(dtype)
    out, lse = reference.forward(*call.arguments)
    grads = [torch.full_like(call.q, torch.nan) for _ in range(3)]
    tensors = (call.dout, out, *call.tensors, *grads)
    pointers = (ctypes.c_void_p * 8)(*(x.data_ptr() for x in tensors))

    def numbers(values) -> ctypes.Array:
        return (ctypes.c_int64 * len(values))(*values)

    library.gradients(
        *(numbers(call.q.shape), ctypes.c_int64(dtype == torch.bfloat16), pointers),
        ctypes.c_void_p(lse.data_ptr()),
        *(numbers(x) for x in (call.windows.flatten().tolist(), call.grid, call.tile)),
        numbers(call.lengths),
        *(ctypes.c_double(call.scale), ctypes.c_int64(threads)),
    )
    return [out, lse, *grads]


@cache
def drawn(dtype: torch.dtype) -> Call:
    """Chunks of several groups, groups of several chunks, queries in several tiles."""
    return draw_call(
        torch.Generator().manual_seed(3),
        grid=(2, 6, 15),
        tile=(1, 3, 4),
        windows=((1, 2, 1), (1, 1, 2)),
        text=500,
        lengths=(680, 150),
        head_dim=24,
        dtype=dtype,
    )


@cache
def emulated(dtype: torch.dtype) -> list[Tensor]:
    """Plain instructions multiply 16 bits in fp32: probabilities are not rounded."""
    return Emulated(kernel=FlashAttention(round_probabilities=lambda p, _: p))(drawn(dtype))


def verdict(results: list[Tensor], dtype: torch.dtype) -> None:
    judge("the backward", results, drawn(dtype), lambda _: list(emulated(dtype)))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, native):
    results = run(native.library(fault), torch.bfloat16)
    with pytest.raises(AssertionError, match=r"more than|break the bound|NaN"):
        verdict(results, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_right_backward_raises_no_alarm(dtype, native):
    """Nor does it read what nobody wrote: the memory of its chunks is NaN before."""
    for threads in (1, 4):
        verdict(run(native.library(), dtype, threads), dtype)
