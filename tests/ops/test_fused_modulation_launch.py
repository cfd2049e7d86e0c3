"""Adaptive layer norm on GPUs: launch choices, refusals, machine code; runs where there is one."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.fused_modulation import config
from hunyuan_fast.ops import layer_norm_modulate
from tests.kit.aot import Specialisation, compile_ahead
from tests.kit.native import ARCHITECTURES, ROOT, assert_no_spills, nvcc
from tests.ops.test_fused_modulation import ROOM, assert_right, inputs, run

WIDTHS = (64, 100, 127, 1024, 3071, 3072, 3073, 8192)
SOURCES = sorted(ROOT.glob(f"csrc/{ROOM}/*.cu"))


def test_chunks_cover_every_row_once():
    for length in (1, 15, 16, 17, 2304, 119_056, 10**7):
        for rows in (config.rows_per_chunk(length), config.gpu_rows_per_chunk(length)):
            chunks = -(-length // rows)
            assert (chunks - 1) * rows < length <= chunks * rows
    assert -(-119_056 // config.rows_per_chunk(119_056)) <= 128
    assert 2 * 132 <= -(-119_056 // config.gpu_rows_per_chunk(119_056)) <= 512


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("choose", [config.triton_forward, config.triton_backward])
def test_triton_blocks_hold_a_row(choose, width):
    choice = choose(width)
    assert width <= choice.block < max(2 * width, 65)
    assert choice.block & (choice.block - 1) == 0
    assert choice.num_warps & (choice.num_warps - 1) == 0
    assert choice.block // (32 * choice.num_warps) <= 32, "elements per thread"


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("choose", [config.cuda_forward, config.cuda_backward])
def test_cuda_blocks_hold_a_row(choose, element_size):
    per_vector = 16 // element_size
    for width in range(per_vector, config.cuda_max_width(element_size) + 1, per_vector):
        choice = choose(width, element_size)
        held = choice.threads * choice.vectors * per_vector
        assert held >= width
        assert held - width < choice.threads * per_vector, "a vector of every thread is idle"
        assert choice.threads % 32 == 0
        assert choice.threads <= config.CUDA_MAX_THREADS
        # what the register file holds: csrc/fused_modulation/backward.cuh
        most = 4 if choose is config.cuda_forward else {2: 2, 4: 3}[element_size]
        assert choice.vectors <= most
    assert choose(3072, 2).threads * choose(3072, 2).vectors * 8 == 3072, "no lane idles at 3072"


def reason(name: str, x: torch.Tensor) -> str | None:
    """What one implementation says to x with zeros as shift and scale."""
    impl = implementations(ROOM)[name]
    vector = x.new_zeros(x.shape[0], x.shape[2])
    return impl.supports(x, vector, vector, 1e-6)


def test_triton_refusals(monkeypatch):
    pytest.importorskip("triton")
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, torch.zeros(1, 1, 8))["triton_impl"])
    x = torch.zeros(1, 2, 8)
    assert "x must be float32, bfloat16 or float16" in reason("triton_impl", x.double())
    assert "E must be at most 8192, it is 8193" in reason("triton_impl", torch.zeros(1, 1, 8193))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "x must be on a CUDA device, it is on cpu" in reason("triton_impl", x)


def test_cpu_refusals():
    pytest.importorskip("hunyuan_fast._C")
    x = torch.zeros(1, 2, 8)
    assert reason("cpu_impl", x) is None
    assert "x must be on the CPU, it is on meta" in reason("cpu_impl", x.to("meta"))
    assert "x must be float32, bfloat16 or float16" in reason("cpu_impl", x.double())


def test_cuda_refusals(monkeypatch):
    if "cuda_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, torch.zeros(1, 1, 8))["cuda_impl"])
    x = torch.zeros(1, 2, 8)
    assert "x must be float32, bfloat16 or float16" in reason("cuda_impl", x.double())
    assert "E is 7 of torch.float32" in reason("cuda_impl", torch.zeros(1, 1, 7))
    assert "at most 6144 in torch.float32" in reason("cuda_impl", torch.zeros(1, 1, 6148))
    assert "at most 8192 in torch.bfloat16" in reason(
        "cuda_impl", torch.zeros(1, 1, 8200).bfloat16()
    )
    assert "x must be on a CUDA device, it is on cpu" in reason("cuda_impl", x)
    with FakeTensorMode():
        on_gpu = torch.empty(1, 2, 8, device="cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "sm_80 or later, it is sm_75" in reason("cuda_impl", on_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert reason("cuda_impl", on_gpu) is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_do_not_depend_on_their_order(direction, generator):
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    x, shift, scale, dy = inputs((2, 9, 72), generator, torch.bfloat16)
    impl = implementations(ROOM)["triton_impl"]
    forward = impl.forward(x, shift, scale, 1e-6)

    def result():
        if direction == "forward":
            return impl.forward(x, shift, scale, 1e-6)
        return impl.backward(dy, x, scale, *forward[1:])

    straight = result()
    for seed in range(3):
        with shuffled_programs(seed):
            shuffled = result()
        for got, wanted in zip(shuffled, straight, strict=True):
            assert torch.equal(got, wanted)


def specialisations() -> list[Specialisation]:
    """What the launchers ask for at the width of the model and at the widest, on three GPUs."""
    cases = []
    for arch in (80, 90, 100):
        for dtype, width in (("*bf16", 3072), ("*fp32", 3072), ("*bf16", 8192), ("*fp32", 8192)):
            forward, backward = config.triton_forward(width), config.triton_backward(width)
            rows = {"x_ptr": dtype, "scale_ptr": dtype, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
            strides = {
                "length": "i32",
                "stride_xb": "i64",
                "stride_xl": "i32",
                "stride_scale": "i32",
            }
            cases.append(
                Specialisation(
                    module=f"hunyuan_fast.kernels.{ROOM}.triton_impl",
                    kernel="_forward_kernel",
                    signature={**rows, "shift_ptr": dtype, "y_ptr": dtype, "eps": "fp32"}
                    | {**strides, "stride_shift": "i32"},
                    constants={"E": width, "BLOCK_E": forward.block},
                    num_warps=forward.num_warps,
                    arch=arch,
                )
            )
            cases.append(
                Specialisation(
                    module=f"hunyuan_fast.kernels.{ROOM}.triton_impl",
                    kernel="_backward_kernel",
                    signature={**rows, "dy_ptr": dtype, "dx_ptr": dtype, "partials_ptr": "*fp32"}
                    | {**strides, "stride_dyb": "i64", "stride_dyl": "i32"}
                    | {"num_chunks": "i32", "chunk_rows": "i32"},
                    constants={"E": width, "BLOCK_E": backward.block},
                    unaligned=("num_chunks", "chunk_rows"),
                    num_warps=backward.num_warps,
                    arch=arch,
                )
            )
        cases.append(
            Specialisation(
                module=f"hunyuan_fast.kernels.{ROOM}.triton_impl",
                kernel="_reduce_kernel",
                signature={"partials_ptr": "*fp32", "num_chunks": "i32"}
                | {"dshift_ptr": "*fp32", "dscale_ptr": "*fp32"},
                constants={"E": 3072, "BLOCK_CHUNKS": 16, "BLOCK_E": 128},
                unaligned=("num_chunks",),
                arch=arch,
            )
        )
    return cases


def test_triton_kernels_compiled_ahead_are_lean():
    pytest.importorskip("triton")
    # Registers per thread: what leaves two programs per multiprocessor at the model's width.
    limits = {"_forward_kernel": 64, "_backward_kernel": 128, "_reduce_kernel": 64}
    for report in compile_ahead(specialisations()):
        report.assert_lean(max_registers=limits[report.kernel], min_access_bits=128)
        # Rows move in wide accesses only; mean and rstd are the narrow ones.
        narrow = sum(count for bits, count in report.global_accesses.items() if bits < 128)
        assert narrow <= 2, report


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


GPU_IMPLEMENTATIONS = tuple(n for n in implementations(ROOM) if n in ("cuda_impl", "triton_impl"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (2, 77, 1024), (1, 2304, 3072), (3, 130, 6144)], ids=str
)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_on_a_gpu(name, shape, dtype, generator):
    for family in ("normal", "offset_1000"):
        args = [t.cuda() for t in inputs(shape, generator, dtype, family)]
        actual = run(name, args)
        assert_right(actual, args)
        for _ in range(20):
            for got, wanted in zip(run(name, args), actual, strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_past_two_to_the_31_on_a_gpu(name, generator):
    x = torch.randn(1, 2**31 // 3072 + 9, 3072, device="cuda", dtype=torch.bfloat16)
    shift, scale = (torch.randn(1, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with use(name, ROOM):
        y = layer_norm_modulate(x, shift, scale)
        for rows in (slice(0, 4), slice(-4, None)):
            assert torch.equal(y[:, rows], layer_norm_modulate(x[:, rows], shift, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_in_a_cuda_graph(name, generator):
    x, shift, scale, _ = (t.cuda() for t in inputs((2, 33, 3072), generator, torch.bfloat16))
    with use(name, ROOM):
        expected = layer_norm_modulate(x, shift, scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer_norm_modulate(x, shift, scale)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)
