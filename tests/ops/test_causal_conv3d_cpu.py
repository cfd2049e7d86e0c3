"""The C++ kernel of the causal convolution beyond what every implementation is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import causal_conv3d
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_as_good_as, assert_equal
from tests.ops.causal_conv3d_cases import (
    ROOM,
    apply,
    as_torch_would,
    by_definition,
    draw_call,
    run,
)

pytestmark = pytest.mark.skipif(
    "cpu_impl" not in implementations(ROOM), reason="the native module is not built"
)
# Positions are worked on in boxes of 16 columns and 12 rows, outputs in blocks of 16, 32 or 64,
# products in runs of 256: none of these divides what follows.
SHAPES = {
    "boxes": {"shape": (1, 5, 3, 26, 35), "channels": 7},
    "frames": {"shape": (2, 6, 14, 4, 3), "channels": 20},
    "blocks": {"shape": (1, 40, 2, 5, 6), "channels": 150},
    "depth": {"shape": (1, 300, 2, 5, 6), "channels": 33},
    "strided": {"shape": (1, 9, 5, 27, 37), "channels": 65, "stride": (2, 2, 2)},
    "phases": {"shape": (1, 9, 4, 13, 18), "channels": 65, "factor": (2, 2, 2)},
    "continued": {"shape": (2, 9, 3, 13, 18), "channels": 17, "past": 2},
    "pointwise": {"shape": (2, 70, 3, 13, 18), "channels": 130, "kernel": 1},
    # few outputs, for which vectors hold channels
    **{f"to {n}": {"shape": (2, 32, 3, 13, 18), "channels": n} for n in (1, 2, 3, 4)},
    "to 3, phases": {"shape": (1, 16, 4, 13, 18), "channels": 3, "factor": (1, 2, 2)},
}


def assert_forward_is_right(call):
    """Gradients are the library's. Short sums are luck: torch's own may be exact."""
    with use("cpu_impl", ROOM), torch.no_grad():
        y = apply(call)
        exact = by_definition(call.map(torch.Tensor.double))
        own = as_torch_would(call)
    assert_as_good_as(y, exact, own, name="y", factor=3.0)


@pytest.mark.parametrize("least", [1, 1 << 20], ids=["added", "apart"])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_sizes_that_no_block_divides(options, least, generator, monkeypatch):
    """With taps that meet the first frame together added up, and without."""
    cpu_impl = implementations(ROOM)["cpu_impl"]
    monkeypatch.setattr(cpu_impl, "_WORTH_A_KERNEL", least)
    assert_forward_is_right(draw_call(generator, **options))


def test_long_sums_lose_no_more_than_short_ones(generator):
    """13,824 products each, in one run after the other."""
    assert_forward_is_right(draw_call(generator, shape=(1, 512, 3, 4, 4), channels=16))


@pytest.mark.parametrize(
    "options",
    [
        *(options for options in SHAPES.values() if "factor" not in options),
        # enough boxes for one thread to take several frames of a box, which share a window
        {"shape": (1, 5, 40, 26, 35), "channels": 7},
        {"shape": (2, 17, 39, 26, 19), "channels": 3, "past": 2},
        {"shape": (1, 3, 61, 50, 70), "channels": 7, "stride": (2, 2, 2)},
        {"shape": (1, 3, 61, 50, 70), "channels": 7, "stride": (3, 1, 2), "past": 5},
    ],
    ids=str,
)
def test_activation_and_residual_of_every_window(options, generator):
    """Against the same in steps, also when a window serves the next box in time."""
    call = draw_call(generator, **options)
    scale, shift = (torch.randn(call.x.shape[:2], generator=generator) for _ in range(2))

    def activated(t, dtype):
        gain, offset = (v.to(dtype)[:, :, None, None, None] for v in (scale, shift))
        return torch.nn.functional.silu(t.to(dtype) * gain + offset)

    def in_steps(dtype):
        maps = (call.x, call.past)
        return call.map(lambda t: activated(t, dtype) if any(t is m for m in maps) else t.to(dtype))

    residual = torch.randn(call.dy.shape, generator=generator)
    with use("cpu_impl", ROOM), torch.no_grad():
        y = causal_conv3d(
            *(call.x, call.weight, call.bias),
            stride=call.stride,
            past=call.past,
            scale=scale,
            shift=shift,
            residual=residual,
        )
        exact, own = by_definition(in_steps(torch.float64)), as_torch_would(in_steps(torch.float32))
    assert_as_good_as(y, exact + residual, own + residual, name="y", factor=3.0)


def test_threads_make_no_difference(generator):
    call = draw_call(generator, shape=(2, 20, 5, 30, 20), channels=40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("cpu_impl", call)[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])


def test_offsets_beyond_32_bits(generator):
    """Samples 2^31 elements apart."""
    call = draw_call(generator, shape=(2, 3, 2, 3, 4), channels=5)
    x = far_apart((2, 3, 2, 3, 4), (2**31, 1, 36, 12, 3), torch.float32).copy_(call.x)
    with use("cpu_impl", ROOM), torch.no_grad():
        wanted = causal_conv3d(call.x, call.weight, call.bias)
        assert_equal(causal_conv3d(x, call.weight, call.bias), wanted)


def test_a_nan_reaches_its_neighbours_only(generator):
    call = draw_call(generator, shape=(2, 4, 5, 6, 7))
    call.x[0, :, 2, 3, 3] = torch.nan
    is_nan = run("cpu_impl", call)[0].isnan()
    assert is_nan[0, :, 2:5, 2:5, 2:5].all()
    assert is_nan.sum() == is_nan[0, :, 2:5, 2:5, 2:5].numel()


def test_native_refusals():
    native = pytest.importorskip("hunyuan_fast._C")
    x = torch.zeros(1, 4, 3, 5, 5).contiguous(memory_format=torch.channels_last_3d)
    packed = torch.zeros(native.causal_conv3d_packed_size_cpu(4, 4, (3, 3, 3)))
    ones, origin = (1, 1, 1), (2, 1, 1)

    def call(**changed):
        given = {"x": x, "past": None, "packed": packed, "bias": None, "scale": None, "shift": None}
        given |= {
            "residual": None,
            "y": x,
            "kernel": (3, 3, 3),
            "stride": ones,
            "origin": origin,
        } | changed
        native.causal_conv3d_forward_cpu(*given.values(), 1)

    call(y=x.clone())
    for words, changed in {
        "x must be float32": {"x": x.double()},
        "x must be channels-last": {"x": x.contiguous()},
        "packed does not fit": {"packed": packed[1:]},
        "past does not fit x": {"past": x[:, :, :, 1:]},
        "residual does not fit y": {"residual": x[:, :, 1:]},
        "bias must be": {"bias": torch.zeros(3)},
        "scale and shift go together": {"scale": torch.zeros(1, 4)},
        "shift must be": {"scale": torch.zeros(1, 4), "shift": torch.zeros(1, 3)},
        "the last output would need frame 4 of 3": {"origin": (0, 1, 1)},
        "1 to 27 taps": {"kernel": (3, 3, 4)},
    }.items():
        with pytest.raises(ValueError, match=words):
            call(**changed)

    def pack(spans, given=packed):
        native.causal_conv3d_pack_cpu(torch.zeros(4, 4, 3, 3, 3), spans, given, 1)

    each = [(0, 1), (1, 2), (2, 3)]
    pack([each, each, each])
    pack([[(0, 3)], each, each], packed[: packed.numel() // 3])
    for words, spans in {
        "packed does not fit": [[(0, 3)], each, each],
        r"within 3 taps, got \[1, 4\)": [[(0, 1), (1, 4)], each, each],
        r"got \[1, 1\)": [[(1, 1)], each, each],
        "at most 27 taps in all, got 36": [[(0, 2), (1, 3)], each, each],
    }.items():
        with pytest.raises(ValueError, match=words):
            pack(spans)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    files = [__file__, str(Path(__file__).with_name("test_causal_conv3d.py"))]
    wanted = "no_block or long_sums or random_calls or upsampling_as_accurate"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        + ["-k", f"(cpu or no_block or long_sums) and ({wanted})"],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
