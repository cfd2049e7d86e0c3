"""Group norm with SiLU on GPUs: launch choices, refusals, machine code; GPU runs."""

from dataclasses import replace

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations
from hunyuan_fast.kernels.group_norm_silu import config
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.group_norm_silu_cases import DTYPES, ROOM, assert_right, draw_call, run

KERNELS = f"hunyuan_fast.kernels.{ROOM}.triton_kernels"
SMALL = (1, 8, 1, 2, 2)


@pytest.mark.parametrize("channels", [1, 8, 16, 33, 128, 512, 513, 2048])
def test_tiles_are_powers_of_two(channels):
    tile = config.triton_tile(channels)
    for size in (tile.rows, tile.channels):
        assert size >= 1 and size & (size - 1) == 0
    assert channels <= tile.channels or tile.channels == 512
    assert tile.rows * tile.channels == 2048


@pytest.mark.parametrize("rows", [1, 17, 720, 10**5, 10**8])
@pytest.mark.parametrize("channels", [16, 128, 512])
def test_chunks_are_whole_tiles(channels, rows):
    tile = config.triton_tile(channels)
    chunk = config.rows_per_chunk(rows, tile)
    assert chunk % tile.rows == 0
    assert 1 <= chunk // tile.rows <= config.MAX_TILES


def reason(name, call):
    return implementations(ROOM)[name].supports(*call.arguments)


def test_triton_refusals(monkeypatch, generator):
    pytest.importorskip("triton")
    call = draw_call(generator, SMALL)
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, *call.arguments)["triton_impl"])
    double = draw_call(generator, SMALL, dtype=torch.float64)
    assert "x must be float32, b" in reason("triton_impl", double)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "must be on a CUDA device" in reason("triton_impl", call)


def test_cpu_refusals(generator):
    pytest.importorskip("hunyuan_fast._C")
    call = draw_call(generator, SMALL)
    assert reason("cpu_impl", call) is None
    assert "on the CPU, it is on meta" in reason("cpu_impl", replace(call, x=call.x.to("meta")))
    double = draw_call(generator, SMALL, dtype=torch.float64)
    assert "must be float32, bfloat16 or" in reason("cpu_impl", double)


def test_programs_do_not_depend_on_their_order(generator):
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    call = draw_call(generator, (2, 16, 3, 9, 11), 4, dtype=torch.bfloat16)
    straight = run("triton_impl", call)
    for seed in range(3):
        with shuffled_programs(seed):
            shuffled = run("triton_impl", call)
        for got, wanted in zip(shuffled, straight, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.skipif("triton_impl" not in implementations(ROOM), reason="needs Triton")
def test_chunks_of_many_tiles(generator, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(config, "MANY_PROGRAMS", 1)
    call = draw_call(generator, (1, 32, 3, 19, 23), 8, family="offset_1000")
    assert_right(run("triton_impl", call), call)


@pytest.mark.skipif("triton_impl" not in implementations(ROOM), reason="needs Triton")
def test_more_channels_than_a_tile_has(generator):
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    call = draw_call(generator, (1, 600, 1, 2, 3), 3, dtype=torch.bfloat16)
    assert_right(run("triton_impl", call), call)


POINTERS = {"x_ptr": "?", "y_ptr": "?", "dy_ptr": "?", "dx_ptr": "?", "lines_ptr": "*fp32"}
COMMON = {"num_rows": "i32", "stride_b": "i64"}
ARGUMENTS = {
    "statistics_kernel": ("x_ptr", "partials_ptr", "chunk_rows"),
    "forward_kernel": ("x_ptr", "y_ptr", "lines_ptr"),
    "gradient_sums_kernel": (
        *("dy_ptr", "x_ptr", "lines_ptr", "partials_ptr", "chunk_rows"),
        "stride_dyb",
    ),
    "backward_kernel": ("dy_ptr", "x_ptr", "dx_ptr", "lines_ptr", "stride_dyb"),
}
TYPES = {"partials_ptr": "*fp32", "chunk_rows": "i32", "stride_dyb": "i64", **COMMON}


def specialisation(kernel: str, dtype: str, channels: int, arch: int) -> Specialisation:
    """What the launcher asks for, with a long clip."""
    tile = config.triton_tile(channels)
    types = {**{name: t.replace("?", dtype) for name, t in POINTERS.items()}, **TYPES}
    names = (*ARGUMENTS[kernel], *COMMON)
    constants = {"C": channels, "BLOCK_C": tile.channels, "ROWS": tile.rows}
    if kernel != "statistics_kernel":
        constants["SILU"] = True
    return Specialisation(
        module=KERNELS,
        kernel=kernel,
        signature={name: types[name] for name in names},
        constants=constants,
        unaligned=("num_rows",),
        num_warps=tile.num_warps,
        arch=arch,
    )


def small_kernels(arch: int) -> list[Specialisation]:
    merge = Specialisation(
        module=KERNELS,
        kernel="merge_kernel",
        signature={
            "partials_ptr": "*fp32",
            "moments_ptr": "*fp32",
            "num_rows": "i32",
            "chunk_rows": "i32",
            "chunks": "i32",
            "num_groups": "i32",
        },
        constants={"C": 128, "CHANNELS": 4, "BLOCK": 4, "PARTS": 256},
        unaligned=("num_rows", "chunks"),
        arch=arch,
    )
    reduction = Specialisation(
        module=KERNELS,
        kernel="reduce_kernel",
        signature={"partials_ptr": "*fp32", "sums_ptr": "*fp32", "chunks": "i32"},
        constants={"WIDTH": 256, "PARTS": 64, "COLUMNS": 16},
        unaligned=("chunks",),
        arch=arch,
    )
    return [merge, reduction]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_compiled_ahead_are_lean(arch):
    pytest.importorskip("triton")
    choices = [("*bf16", 128), ("*fp32", 128)]
    if arch == 90:
        choices += [("*bf16", 512), ("*bf16", 16)]
    wanted = [specialisation(kernel, *c, arch) for kernel in ARGUMENTS for c in choices]
    for report in compile_ahead(wanted):
        report.assert_lean(max_registers=128, min_access_bits=128)
    for report in compile_ahead(small_kernels(arch)):
        report.assert_lean(max_registers=128)


GPU_IMPLEMENTATIONS = tuple(n for n in implementations(ROOM) if n == "triton_impl")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    gpu.size([(2, 128, 5, 33, 35), (1, 512, 3, 16, 16), (2, 48, 2, 9, 9)], [(2, 48, 2, 3, 3)]),
    ids=str,
)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_on_a_gpu(name, shape, dtype, generator):
    for family, silu in (("normal", True), ("offset_1000", False)):
        call = draw_call(generator, shape, 16, dtype=dtype, family=family, silu=silu)
        leaves = [t.cuda() for t in call.leaves]
        moved = replace(call.with_leaves(leaves), dy=call.dy.cuda())
        actual = run(name, moved)
        assert_right(actual, call)
        gpu.assert_same_bits_at_every_run(lambda moved=moved: run(name, moved), gpu.FEW)
