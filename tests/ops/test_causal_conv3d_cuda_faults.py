"""A test of the tests: the emulation of the Hopper kernel must catch wrong index functions."""

import importlib
import shutil

import pytest
import torch

from tests.kit.native import ROOT
from tests.ops.causal_conv3d_cases import by_definition, draw_call
from tests.ops.hopper_emulator import RealSources, check, compiler, emulate, install, library

MACHINE, OURS = "common/sm90_layout.h", "causal_conv3d/sm90_layout.h"
# name: file, what stands there, what stands there instead
FAULTS = {
    "rows swizzled as if four were an atom": (MACHINE, "(offset >> 7 & 7)", "(offset >> 7 & 3)"),
    "nothing swizzled": (MACHINE, "return offset ^ ((offset >> 7 & 7) << 4)", "return offset"),
    "atoms too far apart": (
        MACHINE,
        "<< 16 | uint64_t(kAtomBytes >> 4) << 32",
        "<< 16 | uint64_t(2 * kAtomBytes >> 4) << 32",
    ),
    "no swizzling in the descriptor": (MACHINE, "|\n           uint64_t(1)", "| uint64_t(2)"),
    "columns of a product half as far": (MACHINE, "(kDepth * 2 >> 4)", "(kDepth >> 4)"),
    "rows of the sums by fours": (MACHINE, "thread % 32 / 4 + 8", "thread % 4 + 8"),
    "pairs of sums across": (MACHINE, "8 * (i / 2 % 2)", "8 * (i % 2)"),
    "rows wrap around": (OURS, "n < size ? n : size - 1", "n < size ? n : 0"),
    "first row instead of the nearest": (OURS, "- p.origin.h, p.in.h", ", p.in.h"),
    "stride of columns forgotten": (OURS, "o.w * p.stride.w", "o.w"),
    "past from its end": (OURS, "t + p.past_frames", "-t - 1"),
    "past never read": (OURS, "t < 0 && p.past_frames > 0", "false"),
    "frames and samples exchanged": (OURS, "int(rest % frames)", "int(rest / frames)"),
    "last rows written elsewhere": (OURS, "row < p.positions ? row", "true ? row"),
    "copies of other rows": (OURS, "i / 2 * sm90::kAtomBytes", "i * sm90::kAtomBytes"),
    "taps packed by columns": (OURS, "tap / kernel.w % kernel.h", "tap % kernel.h"),
    "weights packed unswizzled": (OURS, "chunk_offset(row, in_stage", "chunk_offset(0, in_stage"),
    "tiles of columns in one place": (OURS, "int64_t(column_tile) * steps", "int64_t(0) * steps"),
    "sums lie over each other": (OURS, "(chunk ^ 2 * (row & 3)", "(chunk & 2 * (row & 3)"),
    "the second consumer repeats": (OURS, "(consumer * blocks + block)", "(block)"),
}
CALLS = (
    {"shape": (2, 128, 3, 5, 7), "channels": 320, "past": 2},
    {"shape": (1, 64, 5, 6, 15), "channels": 64, "stride": (2, 2, 2)},
    {"shape": (1, 64, 2, 5, 14), "channels": 256, "factor": (1, 2, 2)},
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def alarms(native, generator, monkeypatch) -> int:
    emulate(native, monkeypatch)
    impl = importlib.import_module("hunyuan_fast.kernels.causal_conv3d.cuda_impl")
    count = 0
    for options in CALLS:
        call = draw_call(generator, dtype=torch.bfloat16, **options)
        try:
            y = impl.forward(*call.arguments)
        except AssertionError:
            count += 1
            continue
        exact = by_definition(call.map(torch.Tensor.double))
        error = (y.double() - exact).abs().max()
        count += not error <= 4 * (exact.bfloat16().double() - exact).abs().max()
    return count


def test_the_kernel_as_it_is_raises_no_alarm(tmp_path, generator, monkeypatch):
    assert not alarms(library(tmp_path), generator, monkeypatch)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, tmp_path, generator, monkeypatch):
    file, right, wrong = FAULTS[fault]
    headers = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (headers / file).read_text()
    assert text.count(right) == 1
    (headers / file).write_text(text.replace(right, wrong))
    assert alarms(library(tmp_path, headers), generator, monkeypatch)


def test_a_ring_in_the_wrong_phase_is_caught(tmp_path):
    headers = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (headers / MACHINE).read_text()
    (headers / MACHINE).write_text(text.replace("phase ^= 1", "phase ^= 0"))
    with pytest.raises(AssertionError):
        check(library(tmp_path, headers).ring(2, 9, 0))


def test_producers_that_leave_their_last_copies_are_caught(tmp_path, generator, monkeypatch):
    headers = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = headers / "causal_conv3d/sm90_forward.cuh"
    right = "stage < kStages; ++stage, ring.advance()"
    assert kernel.read_text().count(right) == 1
    kernel.write_text(kernel.read_text().replace(right, "false;"))
    install(RealSources(library(tmp_path), headers), monkeypatch)
    impl = importlib.import_module("hunyuan_fast.kernels.causal_conv3d.cuda_impl")
    call = draw_call(generator, dtype=torch.bfloat16, shape=(1, 64, 1, 4, 5), channels=64)
    with pytest.raises(AssertionError, match="leaves the kernel while its copy_chunk"):
        impl.forward(*call.arguments)
