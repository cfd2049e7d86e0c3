"""Packed projections to joint heads on GPUs: launch choices, refusals, machine code; GPU runs."""

from dataclasses import replace

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.qk_norm_rope import config
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.qk_norm_rope_cases import ROOM, Call, apply, assert_right, draw_call, run

HEAD_DIMS = (2, 6, 64, 80, 96, 128, 250, 256, 512)
KERNELS = f"hunyuan_fast.kernels.{ROOM}.triton_kernels"


def test_chunks_on_the_cpu_cover_every_row_once():
    for num_rows in (1, 7, 8, 9, 212, 2560, 119_056, 10**7):
        rows = config.rows_per_chunk(num_rows)
        chunks = -(-num_rows // rows)
        assert (chunks - 1) * rows < num_rows <= chunks * rows
        assert chunks <= 128


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_hold_whole_heads(head_dim):
    tile = config.triton_tile(head_dim)
    assert head_dim <= tile.block < max(2 * head_dim, 33)
    assert tile.block & (tile.block - 1) == 0
    assert tile.rows & (tile.rows - 1) == 0
    assert tile.rows * tile.block // (32 * tile.num_warps) == 8, "elements per thread"


@pytest.mark.parametrize("length", [1, 8, 9, 256, 2304, 119_056, 10**6])
@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_chunks_on_a_gpu_are_whole_tiles(head_dim, length):
    tile = config.triton_tile(head_dim)
    rows = config.gpu_rows_per_chunk(length, tile)
    assert rows % tile.rows == 0
    assert -(-length // rows) <= config.MANY_PROGRAMS


def test_heads_are_shared_out_when_rows_are_few():
    assert config.heads_per_program(14_882, 24) == 24, "the tables of a long clip are read once"
    for blocks in (1, 3, 320, 4096, 10**6):
        for num_heads in (1, 3, 24, 40):
            heads = config.heads_per_program(blocks, num_heads)
            assert 1 <= heads <= num_heads
            groups = -(-num_heads // heads)
            assert blocks * groups <= max(config.MANY_PROGRAMS, blocks)
            assert (groups - 1) * heads < num_heads, "no program without a head"


def call_of(head_dim: int, dtype: torch.dtype) -> Call:
    return draw_call(torch.Generator().manual_seed(0), heads=1, head_dim=head_dim, dtype=dtype)


def reason(name: str, call: Call) -> str | None:
    return implementations(ROOM)[name].supports(*call.arguments)


def test_triton_refusals(monkeypatch):
    pytest.importorskip("triton")
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, *call_of(8, torch.float32).arguments)["triton_impl"])
    assert "qkv must be float32, b" in reason("triton_impl", call_of(8, torch.float64))
    assert "at most 512, it is 514" in reason("triton_impl", call_of(514, torch.float32))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "must be on a CUDA device" in reason("triton_impl", call_of(8, torch.float32))


def test_cpu_refusals():
    pytest.importorskip("hunyuan_fast._C")
    call = call_of(8, torch.float32)
    assert reason("cpu_impl", call) is None
    assert "on the CPU, it is on meta" in reason("cpu_impl", replace(call, qkv=call.qkv.to("meta")))
    assert "must be float32, bfloat16 or" in reason("cpu_impl", call_of(8, torch.float64))
    assert "at most 512, it is 514" in reason("cpu_impl", call_of(514, torch.float32))
    with use("reference", ROOM):
        apply(call_of(514, torch.float32))


def test_programs_do_not_depend_on_their_order(generator):
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    call = draw_call(generator, video=19, text=3, head_dim=96, dtype=torch.bfloat16)
    straight = run("triton_impl", call)
    for seed in range(3):
        with shuffled_programs(seed):
            shuffled = run("triton_impl", call)
        for got, wanted in zip(shuffled, straight, strict=True):
            assert torch.equal(got, wanted)


SIZES = ("rows", "video_rows", "first_row", "num_heads", "heads_per_program")
# What a launch does not promise to be multiples of 16.
UNALIGNED = (*SIZES, "joint_rows", "chunk_rows", "num_parts")


def specialisation(
    kernel: str, dtype: str, weight: str, head_dim: int, arch: int, *, with_q: bool = True
) -> Specialisation:
    """What the launcher asks for, with qkv the columns of a wider result of a long clip."""
    tile = config.triton_tile(head_dim)
    inputs = dict.fromkeys(("q_weight_ptr", "k_weight_ptr"), weight)
    inputs |= {"qkv_ptr": dtype, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
    sizes = dict.fromkeys((*SIZES, "stride_l", "stride_cos", "stride_sin"), "i32")
    signature = {**inputs, **sizes, "stride_b": "i64"}
    constants = {"D": head_dim, "BLOCK_D": tile.block, "ROWS": tile.rows}
    if kernel == "forward_kernel":
        constants["WITH_Q"] = with_q
        signature |= {"joint_rows": "i32", **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), dtype)}
    else:
        tensors = ("dq_ptr", "dk_ptr", "dv_ptr", "dqkv_ptr")
        signature |= {**dict.fromkeys(tensors, dtype), "partials_ptr": "*fp32", "chunk_rows": "i32"}
        for name in "qkv":
            signature |= {f"stride_{name}b": "i64", f"stride_{name}l": "i32"}
            signature[f"stride_{name}n"] = "i64"  # heads first: L D elements between them
    return Specialisation(
        module=KERNELS,
        kernel=kernel,
        signature=signature,
        constants=constants,
        unaligned=tuple(name for name in UNALIGNED if name in signature),
        num_warps=tile.num_warps,
        arch=arch,
    )


def reduction(arch: int) -> Specialisation:
    return Specialisation(
        module=KERNELS,
        kernel="reduce_kernel",
        signature={"partials_ptr": "*fp32", "sums_ptr": "*fp32", "num_parts": "i32"},
        constants={"WIDTH": 256, "PARTS": 256, "COLUMNS": 16},
        unaligned=("num_parts",),
        arch=arch,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_compiled_ahead_are_lean(arch):
    pytest.importorskip("triton")
    # Registers per thread: what leaves seven programs to a multiprocessor, and three.
    limits = {"forward_kernel": 72, "backward_kernel": 160, "reduce_kernel": 64}
    choices = [("*bf16", "*bf16", 128), ("*fp32", "*fp32", 128)]
    if arch == 90:
        choices += [("*bf16", "*fp32", 64), ("*bf16", "*bf16", 80)]
    wanted = [
        specialisation(kernel, *choice, arch)
        for kernel in ("forward_kernel", "backward_kernel")
        for choice in choices
    ]
    wanted.append(specialisation("forward_kernel", *choices[0], arch, with_q=False))
    for report in compile_ahead([*wanted, reduction(arch)]):
        report.assert_lean(max_registers=limits[report.kernel], min_access_bits=128)
        # Heads move in wide accesses only. The narrow ones stand before and after the loop over
        # them: four even features of each table, two weights, two sums.
        narrow = sum(count for bits, count in report.global_accesses.items() if bits < 128)
        assert narrow <= 2 * 4 + 2 + 2, report


GPU_IMPLEMENTATIONS = tuple(n for n in implementations(ROOM) if n in ("cuda_impl", "triton_impl"))


def on_gpu(call: Call) -> Call:
    return replace(
        call.with_leaves([t.cuda() for t in call.leaves]),
        tables=tuple(t.cuda() for t in call.tables),
        gradients=tuple(t.cuda() for t in call.gradients),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_on_a_gpu(name, streams, head_dim, dtype, generator):
    heads = gpu.size(24 if head_dim == 128 else 3, 2)
    sizes = {"video": gpu.size(333, 13), "text": gpu.size(77, 5), "heads": heads}
    for family in ("normal", "offset_1000"):
        options = {"streams": streams, "dtype": dtype, "family": family, "head_dim": head_dim}
        call = draw_call(generator, **options, **sizes)
        moved = on_gpu(call)
        actual = run(name, moved)
        assert_right(actual, call)
        gpu.assert_same_bits_at_every_run(lambda moved=moved: run(name, moved), gpu.FEW)


@pytest.mark.gpu
@pytest.mark.whole_gpu
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_past_two_to_the_31_on_a_gpu(name):
    """The columns of the single block's projection at full length, as the model has them."""
    length, video = gpu.size((119_056, 118_800), (356, 100))
    heads, head_dim = gpu.size((24, 128), (2, 64))
    impl = implementations(ROOM)[name]

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    qkv = normal(1, length, 7 * heads * head_dim)[..., : 3 * heads * head_dim]
    weights = normal(head_dim), normal(head_dim)
    cos, sin = (normal(video, head_dim, dtype=torch.float32) for _ in range(2))
    gradients = [normal(1, length, heads, head_dim) for _ in range(3)]
    rest = heads, None, None, None, 1e-6
    results = impl.forward(qkv, *weights, cos, sin, *rest)
    dqkv, _, _ = impl.backward(*gradients, qkv, *weights, cos, sin, *rest)
    for first, count in ((0, 8), (video - 44, 300), (length - 8, 8)):
        rows = slice(first, first + count)
        tables = cos[rows], sin[rows]
        given = qkv[:, rows], *weights, *tables, *rest
        for got, wanted in zip(impl.forward(*given), results, strict=True):
            assert torch.equal(got, wanted[:, rows])
        got, _, _ = impl.backward(*(g[:, rows] for g in gradients), *given)
        assert torch.equal(got, dqkv[:, rows])
