"""fused_modulation on GPUs: launch choices, refusals, machine code; runs where there is one."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hunyuan_fast import ops
from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.fused_modulation import config, reference
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.kit.native import ARCHITECTURES, ROOT, assert_no_spills, nvcc
from tests.ops.fused_modulation_cases import (
    DTYPES,
    FUNCTIONS,
    NORM,
    ROOM,
    assert_right,
    assert_same_bits,
    draw_call,
    each_function,
    run,
)

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
@pytest.mark.parametrize(
    ("choose", "options"),
    [
        (config.triton_forward, {}),
        (config.triton_backward, {}),
        (config.triton_backward, {"both": True}),
    ],
    ids=["forward", "backward", "backward of both"],
)
def test_triton_blocks_hold_a_row(choose, options, width):
    choice = choose(width, **options)
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


def reason(name: str, x: torch.Tensor, *gate_half: torch.Tensor | None) -> str | None:
    """What one implementation says to x with zeros as shift and scale."""
    impl = implementations(ROOM)[name]
    vector = x.new_zeros(x.shape[0], x.shape[2])
    return impl.supports(x, vector, vector, 1e-6, *gate_half)


def test_triton_refusals(monkeypatch):
    pytest.importorskip("triton")
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, *reference.example(torch.device("cpu")))["triton_impl"])
    x = torch.zeros(1, 2, 8)
    assert "x must be float32, bfloat16 or float16" in reason("triton_impl", x.double())
    assert "E must be at most 8192, it is 8193" in reason("triton_impl", torch.zeros(1, 1, 8193))
    wide = torch.zeros(1, 1, 6145)
    assert reason("triton_impl", wide) is None
    assert "at most 6144 with gate and norm" in reason("triton_impl", wide, wide, wide[0])
    wide = wide.bfloat16()
    assert reason("triton_impl", wide, wide, wide[0]) is None
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
        pytest.skip(explain(ROOM, *reference.example(torch.device("cpu")))["cuda_impl"])
    x = torch.zeros(1, 2, 8)
    assert "x must be float32, bfloat16 or float16" in reason("cuda_impl", x.double())
    assert "E is 7 of torch.float32" in reason("cuda_impl", torch.zeros(1, 1, 7))
    assert "they take no gate" in reason("cuda_impl", x, x, x[:, 0])
    assert "one vector per sample" in reason("cuda_impl", x, None, None, torch.zeros(1, 2).long())
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


@each_function
def test_programs_do_not_depend_on_their_order(function, generator):
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    call = draw_call(function, (2, 9, 72), generator, torch.bfloat16, num_vectors=2)
    straight = run("triton_impl", call)
    for seed in range(2):
        with shuffled_programs(seed):
            assert_same_bits(run("triton_impl", call), straight)


KERNELS = f"hunyuan_fast.kernels.{ROOM}.triton_kernels"
OF_HALF = {
    "gate": "y gate dresidual dy dgate",
    "norm": "shift scale modulated mean rstd dmodulated dx dshift dscale",
    "index": "index",
}
TYPES = {"index": "*i64", "mean": "*fp32", "rstd": "*fp32", "partials": "*fp32"}


def pointers(names: str, halves: str, dtype: str) -> tuple[dict, dict]:
    """Of the pointers of a kernel the types of those that its halves have, and None for others."""
    absent = {n for half, each in OF_HALF.items() if half not in halves for n in each.split()}
    given = {f"{n}_ptr": TYPES.get(n, dtype) for n in names.split() if n not in absent}
    return given, {f"{n}_ptr": None for n in names.split() if n in absent}


def strides(names: str) -> dict[str, str]:
    """Only those of samples of rows are past 2^31."""
    return {
        f"stride_{n}": "i64" if n in ("xb", "yb", "rb", "drb", "dmb") else "i32"
        for n in names.split()
    }


VECTOR_STRIDES = "gate_b gate_m scale_b scale_m index_b index_l"


def forward(arch: int, dtype: str, width: int, halves: str) -> Specialisation:
    choice = config.triton_forward(width)
    given, absent = pointers("x y gate shift scale index modulated mean rstd", halves, dtype)
    residual = {"residual_ptr": dtype if "gate" in halves else None}
    return Specialisation(
        module=KERNELS,
        kernel="forward_kernel",
        signature=given
        | {name: each for name, each in residual.items() if each}
        | {"length": "i32", "eps": "fp32"}
        | strides(f"xb xl yb yl shift_b shift_m {VECTOR_STRIDES}"),
        constants=absent
        | {name: each for name, each in residual.items() if not each}
        | {"E": width, "BLOCK_E": choice.block},
        unaligned=("stride_index_l",),
        num_warps=choice.num_warps,
        arch=arch,
    )


def backward(arch: int, dtype: str, width: int, halves: str) -> Specialisation:
    choice = config.triton_backward(width, both="gate norm" in halves)
    names = "dresidual dmodulated y gate scale index mean rstd dx dy partials"
    given, absent = pointers(names, halves, dtype)
    saved = {"residual_ptr": dtype if "norm" in halves else None}
    sizes = dict.fromkeys(("length", "num_chunks", "chunk_rows", "num_vectors"), "i32")
    return Specialisation(
        module=KERNELS,
        kernel="backward_kernel",
        signature=given
        | {name: each for name, each in saved.items() if each}
        | sizes
        | strides(f"drb drl dmb dml rb rl yb yl {VECTOR_STRIDES}"),
        constants=absent
        | {name: each for name, each in saved.items() if not each}
        | {"E": width, "BLOCK_E": choice.block},
        unaligned=("num_chunks", "chunk_rows", "num_vectors", "stride_index_l"),
        num_warps=choice.num_warps,
        arch=arch,
    )


def specialisations() -> list[Specialisation]:
    """What the launchers ask for at the width of the model and at the widest, on three GPUs."""
    widest = [("*fp32", config.MAX_WIDTH, "norm")]
    widest += [
        (dtype, config.triton_max_width(size, both=True), "gate norm index")
        for dtype, size in (("*bf16", 2), ("*fp32", 4))
    ]
    model = [("*bf16", 3072, each) for each in ("norm", "gate", "gate norm", "gate norm index")]
    cases = [
        make(arch, *each)
        for arch in (80, 90, 100)
        for each in (*model, *widest)
        for make in (forward, backward)
    ]
    given, absent = pointers("partials dshift dscale dgate", "gate norm", "*bf16")
    reduce = Specialisation(
        module=KERNELS,
        kernel="reduce_kernel",
        signature=given | {"num_chunks": "i32", "columns": "i32"},
        constants=absent | {"BLOCK_CHUNKS": 16, "BLOCK_E": 128},
        unaligned=("num_chunks",),
    )
    return [*cases, reduce]


def test_triton_kernels_compiled_ahead_are_lean():
    pytest.importorskip("triton")
    # Registers per thread: what leaves two programs per multiprocessor at the model's width, one
    # of 16 warps where backward has both halves.
    limits = {"forward_kernel": 64, "backward_kernel": 128, "reduce_kernel": 64}
    for report in compile_ahead(specialisations()):
        report.assert_lean(max_registers=limits[report.kernel], min_access_bits=128)
        # Rows move in wide accesses only; narrow are mean, rstd, values of an index, final sums.
        narrow = sum(count for bits, count in report.global_accesses.items() if bits < 128)
        assert narrow <= 4, report


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


GPU_IMPLEMENTATIONS = tuple(n for n in implementations(ROOM) if n in ("cuda_impl", "triton_impl"))


GPU_CALLS = [("triton_impl", function, m) for function in FUNCTIONS for m in (None, 2)]
GPU_CALLS = [c for c in [*GPU_CALLS, ("cuda_impl", NORM, None)] if c[0] in GPU_IMPLEMENTATIONS]
each_call = pytest.mark.parametrize(("name", "function", "num_vectors"), GPU_CALLS)


def on_gpu(function, shape, generator, dtype=torch.bfloat16, family="normal", num_vectors=None):
    call = draw_call(function, shape, generator, dtype, family, num_vectors=num_vectors)
    return call.map(lambda t: t.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    gpu.size(
        [(1, 1, 64), (2, 77, 1024), (1, 777, 3072), (3, 130, 4096)], [(1, 1, 64), (2, 7, 1024)]
    ),
    ids=str,
)
@each_call
def test_on_a_gpu(name, function, num_vectors, shape, dtype, generator):
    for family in ("normal", "offset_1000"):
        call = on_gpu(function, shape, generator, dtype, family, num_vectors)
        actual = run(name, call)
        assert_right(actual, call)
        gpu.assert_same_bits_at_every_run(lambda call=call: [*run(name, call).values()], gpu.FEW)


@pytest.mark.gpu
@pytest.mark.whole_gpu
@each_call
def test_past_two_to_the_31_on_a_gpu(name, function, num_vectors, generator):
    length = gpu.rows_past_two_to_the_31(3072)
    x = torch.randn(1, length, 3072, device="cuda", dtype=torch.bfloat16)
    small = on_gpu(function, (1, 4, 3072), generator, num_vectors=num_vectors)
    rows = {each: x for each in ("x", "y") if each in small.tensors}
    index = None
    if num_vectors is not None:
        index = torch.arange(x.shape[1], device="cuda")[None] % num_vectors
    public = getattr(ops, function)
    with torch.no_grad(), use(name, ROOM):
        whole = public(*(small.tensors | rows).values(), index=index)
        for part in (slice(0, 4), slice(-4, None)):
            few = small.tensors | {each: t[:, part] for each, t in rows.items()}
            some = public(*few.values(), index=None if index is None else index[:, part])
            for got, wanted in zip(as_tuple(whole), as_tuple(some), strict=True):
                assert torch.equal(got[:, part], wanted)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)
