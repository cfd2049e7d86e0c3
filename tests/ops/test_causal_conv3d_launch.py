"""The Triton kernels of the causal convolutions: launch choices, refusals, machine code."""

import itertools

import pytest
import torch

from hunyuan_fast.dispatch import implementations
from hunyuan_fast.kernels.causal_conv3d import config
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.causal_conv3d_cases import ROOM, draw_call

MODULE = "hunyuan_fast.kernels.causal_conv3d.triton_kernels"


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 0), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("first", [0, -2])
def test_segments_hold_every_place_once_and_all_of_the_padding(first, size, before, after):
    places, padded = [], []
    for part in config.segments(first, size, before, after):
        inside = range(part.start, part.start + part.count)
        places += inside
        offsets = range(part.from_offset, part.from_offset + part.folds)
        assert 0 in offsets and (part.count == 1 or part.folds == 1)
        padded += [place + offset for place in inside for offset in offsets]
    assert places == list(range(first, first + size))
    assert sorted(padded) == list(range(first - before, first + size + after))


@pytest.mark.parametrize("size", [2, 4])
def test_tiles_are_powers_of_two_that_fit_the_channels(size):
    for columns, depth in itertools.product((1, 3, 16, 32, 128, 512), repeat=2):
        tiles = [config.tile(columns, depth, size, activated) for activated in (False, True)]
        for tile in (*tiles, config.weight_tile(depth, columns, size)):
            for side in (tile.rows, tile.columns, tile.depth):
                assert side >= 16 and side & (side - 1) == 0
            # what a multiprocessor has for the tiles in flight
            assert (tile.rows + tile.columns) * tile.depth * size * tile.num_stages <= 160 * 1024
            assert tile.rows * tile.columns <= 64 * 32 * tile.num_warps


def test_hopper_takes_twice_the_sums_where_there_are_so_many():
    for columns, depth in itertools.product((1, 16, 64, 128, 256, 512), (3, 32, 64, 512)):
        plain = config.tile(columns, depth, 2)
        large = config.tile(columns, depth, 2, hopper=True)
        if min(columns, 2 * depth) < 128:
            assert large == plain
        else:
            assert large.rows * large.columns == 128 * 256 and large.columns <= columns
            read = (large.rows + large.columns) * large.depth * 2 * large.num_stages
            assert read <= 227 * 1024
        for options in ({"activated": True}, {"element_size": 4}):
            asked = {"element_size": 2, **options}
            assert config.tile(columns, depth, hopper=True, **asked) == config.tile(
                columns, depth, **asked
            )


def test_positions_are_aligned_where_all_strides_are():
    impl = triton_impl()
    x = torch.empty(1, 8, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    wide = torch.empty(1, 4, 4, 3, 12, dtype=torch.bfloat16).permute(0, 4, 3, 1, 2)
    assert impl._aligned(x) and impl._aligned(x, x[:, :, 1:])
    assert not impl._aligned(x, wide[:, :8])
    assert not impl._aligned(x[:, 1:])


def test_sums_are_split_where_programs_are_few_and_memory_allows():
    assert config.splits(100, 1, 100) == 1
    assert config.splits(10**8, 4, 10**4) == 256
    assert config.splits(10**8, 432, 27 * 512 * 512) == 3
    assert config.splits(10**8, 1, 2**26) == 1
    assert config.splits(2000, 1, 100) == 3


def triton_impl():
    found = implementations(ROOM)
    if "triton_impl" not in found:
        pytest.skip("needs Triton")
    return found["triton_impl"]


def test_refusals(generator, monkeypatch):
    impl = triton_impl()
    call = draw_call(generator, shape=(1, 2, 2, 2, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert impl.supports(*call.arguments) is None
    double = call.map(torch.Tensor.double)
    assert "it is torch.float64" in impl.supports(*double.arguments)
    empty = call.map(lambda t: t[:0] if t is call.x else t)
    assert "it has 0" in impl.supports(*empty.arguments)
    wide = torch.empty(1, 1, 1, 1, 1).expand(4, 1, 3, 2**14, 2**14)
    assert "there are 3221225472" in impl.supports(wide, *call.arguments[1:])
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "it is on cpu" in impl.supports(*call.arguments)


def test_programs_do_not_depend_on_their_order(generator):
    impl = triton_impl()
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    sizes = {"shape": (2, 3, 2, 1, 2), "channels": 140, "kernel": (3, 1, 3)}
    call = draw_call(generator, **sizes, past=2, dtype=torch.bfloat16)
    x, weight, _, stride, past, factor = call.arguments

    def results():
        wants = (False, True, False, True)
        _, dweight, _, dpast = impl.backward(call.dy, x, weight, stride, past, factor, wants)
        return impl.forward(*call.arguments), dweight, dpast

    straight = results()
    with shuffled_programs(1):
        for got, wanted in zip(results(), straight, strict=True):
            assert torch.equal(got, wanted)


AXES = "THW"
# kernel, stride, factor, leads of the layers of the VAE; of phases the kernel is that of a phase
SHAPES = {
    "plain": ((3, 3, 3), (1, 1, 1), (1, 1, 1), (2, 1, 1)),
    "down": ((3, 3, 3), (2, 2, 2), (1, 1, 1), (2, 1, 1)),
    "up": ((2, 2, 2), (1, 1, 1), (2, 2, 2), (1, 1, 1)),
}


def geometry(shape: str) -> dict[str, int]:
    groups = zip(("K", "STEP_", "F", "LEAD_"), SHAPES[shape], strict=True)
    named = {f"{g}{axis}": n for g, ns in groups for axis, n in zip(AXES, ns, strict=True)}
    return {**named, "SHIFT_T": 1}


def strides(prefix: str, axes: str) -> dict[str, str]:
    """In channels-last maps all but those of columns may pass 2^31."""
    return {f"stride_{prefix}{axis}": "i32" if axis == "w" else "i64" for axis in axes}


def sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


OUT_SIZES = ("out_frames", "out_height", "out_width")


def blocks(tile: config.Tile) -> tuple[dict[str, int], dict[str, int]]:
    named = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    return named, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def forward_case(
    arch: int, dtype: str, shape: str, *, past: int, fused: bool, channels: int = 512
) -> Specialisation:
    size = 4 if dtype == "*fp32" else 2
    tile, launch = blocks(config.tile(channels, channels, size, fused, hopper=arch == 90))
    flags = dict.fromkeys(("ACTIVATED", "HAS_RESIDUAL"), fused)
    pointers = ("x_ptr", "past_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "y_ptr")
    signature = dict.fromkeys(pointers, dtype) | {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}
    signature |= sizes("frames", "height", "width", *OUT_SIZES, "tiles_n")
    for prefix in "xpr":
        signature |= strides(prefix, "bthw")
    constants = dict.fromkeys(("C", "OUT", "OUT_PAD"), channels)
    constants |= {"PAST": past, "ALIGNED": True, "HAS_BIAS": True}
    return Specialisation(
        module=MODULE,
        kernel="forward_kernel",
        signature=signature,
        constants={**constants, **flags, **geometry(shape), **tile},
        unaligned=("frames", "height", "width", *OUT_SIZES, "tiles_n"),
        arch=arch,
        **launch,
    )


def input_gradient_case(arch: int, dtype: str, shape: str, *, edge: bool) -> Specialisation:
    tile, launch = blocks(config.tile(512, 512, 4 if dtype == "*fp32" else 2))
    names = ("first", "box", "from", "folds")
    box = [f"{n}_{axis}" for n in names for axis in ("frame", "row", "column")]
    box = [n + "s" if n.startswith("box") else n for n in box]
    whole = ("frames", "height", "width", *OUT_SIZES, *box, "tiles_n")
    signature = dict.fromkeys(("dy_ptr", "weight_ptr", "dx_ptr"), dtype) | sizes(*whole)
    constants = {"C": 512, "C_PAD": 512, "OUT": 512, "PAST": 0, "EDGE": edge}
    return Specialisation(
        module=MODULE,
        kernel="input_gradient_kernel",
        signature=signature | strides("", "bthw"),
        constants={**constants, **geometry(shape), **tile},
        unaligned=whole,
        arch=arch,
        **launch,
    )


def weight_gradient_case(arch: int, dtype: str, shape: str, *, past: int) -> Specialisation:
    tile, launch = blocks(config.weight_tile(512, 512, 4 if dtype == "*fp32" else 2))
    whole = ("batch", "height", "width", *OUT_SIZES, "tiles_n", "chunk")
    signature = dict.fromkeys(("dy_ptr", "x_ptr", "past_ptr"), dtype)
    signature |= {"partials_ptr": "*fp32"} | sizes(*whole)
    for prefix in ("", "x", "p"):
        signature |= strides(prefix, "bthw")
    return Specialisation(
        module=MODULE,
        kernel="weight_gradient_kernel",
        signature=signature,
        constants={"C": 512, "OUT": 512, "PAST": past, "ALIGNED": True, **geometry(shape), **tile},
        unaligned=whole,
        arch=arch,
        **launch,
    )


def specialisations() -> list[Specialisation]:
    """What the launchers ask for at the VAE's widest layers, on three GPUs."""
    cases = []
    for arch, dtype in itertools.product((80, 90, 100), ("*bf16", "*fp32")):
        cases += [
            forward_case(arch, dtype, "plain", past=0, fused=False),
            forward_case(arch, dtype, "plain", past=2, fused=True),
            forward_case(arch, dtype, "plain", past=2, fused=False),
            forward_case(arch, dtype, "up", past=0, fused=False),
            forward_case(arch, dtype, "up", past=1, fused=False, channels=128),
            input_gradient_case(arch, dtype, "plain", edge=False),
            input_gradient_case(arch, dtype, "up", edge=True),
            weight_gradient_case(arch, dtype, "plain", past=2),
        ]
        if arch == 90:
            cases += [
                forward_case(arch, dtype, "down", past=0, fused=False),
                input_gradient_case(arch, dtype, "down", edge=False),
                weight_gradient_case(arch, dtype, "up", past=0),
            ]
        cases.append(
            Specialisation(
                module=MODULE,
                kernel="reduce_kernel",
                signature={"partials_ptr": "*fp32", "sums_ptr": "*fp32"}
                | {"num_parts": "i32", "size": "i32"},
                constants={"BLOCK": 1024},
                unaligned=("num_parts",),
                arch=arch,
            )
        )
    return cases


def test_triton_kernels_compiled_ahead_are_lean():
    pytest.importorskip("triton")
    cases = specialisations()
    for case, report in zip(cases, compile_ahead(cases), strict=True):
        report.assert_lean(min_access_bits=128)
        if case.kernel == "forward_kernel" and not case.constants["ACTIVATED"]:
            # The bias may be read value by value; a map that is has lost its alignment.
            assert report.global_accesses.get(16, 0) <= 1, (case.constants, report.global_accesses)
