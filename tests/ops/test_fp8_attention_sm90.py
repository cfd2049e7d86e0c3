"""The Hopper kernel of attention over codes: emulated, its machine code, on a GPU."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hunyuan_fast.dispatch import implementations
from hunyuan_fast.kernels.fp8_attention import reference
from tests.kit import gpu, hopper
from tests.kit.memory import Fenced
from tests.kit.native import (
    ARCHITECTURES,
    ROOT,
    assert_no_spills,
    build,
    disassembler,
    machine_code,
    nvcc,
)
from tests.kit.numerics import assert_equal
from tests.ops.fp8_attention_cases import (
    DTYPES,
    E4M3,
    ROOM,
    Call,
    draw_call,
    errors,
    judge,
    statistics,
)

DRIVER = ROOT / "tests/native/hopper_fp8_attention.cpp"
SOURCES = sorted((ROOT / "csrc/fp8_attention").glob("sm90_forward_*.cu"))
MOST_REGISTERS = 232  # of a consumer: kConsumerRegisters in sm90_forward.cuh

# length, then lengths: tiles hold 128 queries, 64 for each of two, and 128 keys; there are 4 stages
CASES = {
    "one token": (1, (1,)),
    "half a tile and a row": (65, (65, 64)),
    "exactly one tile": (128, (128,)),
    "two tiles and none": (256, (256, 0)),
    "every kind": (300, (0, 1, 300, 129)),
    "more tiles than stages": (705, (705, 640)),
}

needs_compiler = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def impl():
    """The implementation itself: the dispatcher does not load it in a build without CUDA."""
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    return importlib.import_module(f"hunyuan_fast.kernels.{ROOM}.cuda_impl")


class Emulator:
    """What ``_C`` has of the Hopper kernel, on the emulated machine."""

    def __init__(self) -> None:
        self._kernels = hopper.build(DRIVER)
        self.seed = 0
        self.processors = 3

    def fp8_attention_hopper(self, *arguments: Tensor | int | None) -> None:
        *codes, kv_len, out, cluster, _ = arguments
        batch, length, heads, _ = out.shape
        step = 0 if kv_len is None else kv_len.stride(0) * kv_len.element_size() // 4
        numbers = [batch, length, heads, codes[0].shape[2], out.element_size()]
        numbers += [out.dtype == torch.float16, step, *out.stride()[:3], cluster]
        self._kernels.run(
            "fp8_attention_forward",
            *(*codes, kv_len, out, numbers),
            seed=self.seed,
            processors=self.processors,
        )


@pytest.fixture
def emulated(impl, monkeypatch) -> Emulator:
    """In the place of the native functions, and of a device to call them on."""
    emulator = Emulator()
    monkeypatch.setattr(impl, "_C", emulator)
    monkeypatch.setattr(impl, "_coder", lambda: reference)
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return emulator


def drawn(generator: torch.Generator, length: int, lengths: tuple[int, ...], **more) -> Call:
    more = {"heads": 1, "outliers": 4.0, **more}
    return draw_call(generator, length=length, lengths=lengths, head_dim=128, **more)


# ---- emulated


@needs_compiler
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_emulated(case, cluster, impl, emulated, generator):
    length, lengths = CASES[case]
    emulated.seed = length
    call = drawn(generator, length, lengths, heads=2 if length < 300 else 1)
    codes = reference.quantize(*call.arguments, statistics(call))
    out = impl.attend(codes, call.kv_len, torch.empty_like(call.q), cluster=cluster)
    judge("cuda_impl", out, call)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [6.0, 0.01])
def test_sharp_and_flat_scores(sharpness, dtype, impl, emulated, generator):
    call = drawn(generator, 400, (400, 290), dtype=dtype)
    call = Call(*call.tensors, call.lengths, call.scale * sharpness)
    judge("cuda_impl", impl.forward(*call.arguments), call)


@needs_compiler
@pytest.mark.parametrize("seed", [*hopper.EXTREMES, 4, 5, 6, 7])
@pytest.mark.parametrize(("processors", "cluster"), [(1, 1), (5, 1), (2, 2), (6, 2)])
def test_the_order_of_things_does_not_matter(seed, processors, cluster, impl, emulated, generator):
    """Copies and products early or late, one block for all items or one for each: same bits."""
    call = drawn(generator, 260, (0, 1, 260, 129))
    codes = reference.quantize(*call.arguments, statistics(call))
    expected = impl.attend(codes, call.kv_len, torch.empty_like(call.q), cluster=1)
    emulated.seed, emulated.processors = seed, processors
    out = impl.attend(codes, call.kv_len, torch.empty_like(call.q), cluster=cluster)
    assert_equal(out, expected)


@pytest.mark.parametrize(
    ("length", "cluster"), [(1, 1), (129, 2), (385, 2), (3 * 128, 1), (33 * 128, 2), (119_056, 2)]
)
def test_blocks_share_what_they_fetch_where_few_would_idle(length, cluster, impl):
    assert impl._blocks_of_cluster(torch.empty(1, length, 1, 128, device="meta")) == cluster


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_width(dtype, impl, emulated, generator):
    """Of any stride, and out of bounds: those on a GPU are not looked at by the host."""
    call = drawn(generator, 70, (40, 0, 70))
    known = statistics(call)
    codes = reference.quantize(*call.arguments, known)
    expected = impl.attend(codes, call.kv_len, torch.empty_like(call.q))
    strided = torch.tensor([[40, 9], [-3, 9], [2**31 - 1, 9]], dtype=dtype)[:, 0]
    for lengths in (strided, strided.contiguous()):
        assert_equal(impl.attend(codes, lengths, torch.empty_like(call.q)), expected)
    whole = impl.attend(codes, None, torch.empty_like(call.q))
    assert_equal(whole[2], expected[2])


@needs_compiler
@pytest.mark.parametrize("gap", [40, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_a_view_beside_other_results(dtype, gap, impl, emulated, generator):
    call = drawn(generator, 140, (140, 7), heads=2, dtype=dtype)
    beside = Fenced((2, 140, 2 * 128), dtype, gap=gap)
    view = beside.view.unflatten(-1, (2, 128))
    assert impl.forward(*call.arguments, view) is view
    beside.check()
    assert_equal(view, impl.forward(*call.arguments))


@needs_compiler
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_stays_in_its_head(which, impl, emulated, generator):
    call = drawn(generator, 130, (130, 130), heads=2)
    call.tensors[which][0, 3, 1, 2] = torch.nan
    out = impl.forward(*call.arguments)
    assert not out[0, 3, 1].isfinite().all()
    assert out[1].isfinite().all() and out[0, :, 0].isfinite().all()


@needs_compiler
def test_the_emulated_machine_rounds_to_codes_as_torch_does(generator):
    code = hopper.build(DRIVER)._native.fp8_attention_code
    code.argtypes = (hopper.ctypes.c_double,)
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    ordered = every[~every.isnan()].sort().values
    between = (ordered[1:] + ordered[:-1]) / 2  # ties
    drawn = torch.randn(500, generator=generator) * 10 ** torch.linspace(-4, 2.5, 500)
    for x in (*ordered.tolist(), *between.tolist(), *drawn.tolist()):
        wanted = torch.tensor(x).clamp(-448, 448).to(E4M3)
        assert code(x) == wanted.view(torch.uint8), x
    assert code(1e9) == 0x7E and code(torch.nan) == 0x7F


# ---- refusals


def test_refusals(impl, generator, monkeypatch):
    call = drawn(generator, 20, (20,))
    assert "must be on a CUDA device, it is on cpu" in impl.supports(*call.arguments)
    small = draw_call(generator, head_dim=64)
    assert "must be 128, it is 64" in impl.supports(*small.arguments)
    assert "must not be empty" in impl.supports(*call.map(lambda x: x[:0]).arguments)
    for here, reason in (((9, 0), None), ((10, 0), "the GPU must be sm_90, it is sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, here=here: here)
        with FakeTensorMode():
            x = torch.empty(1, 8, 2, 128, device="cuda", dtype=torch.bfloat16)
            assert impl.supports(x, x, x, None, 1.0) == reason
    with FakeTensorMode():
        x = torch.empty(1, 1, 2**31, 128, device="cuda", dtype=torch.bfloat16)
        assert "tiles of queries" in impl.supports(x, x, x, None, 1.0)


def test_coding_is_done_by_whom_there_is(impl, monkeypatch):
    for found, name in ((None, "reference"), (object(), "triton_impl")):
        if found:
            pytest.importorskip("triton")
        monkeypatch.setattr(impl, "find_spec", lambda _, found=found: found)
        impl._coder.cache_clear()
        assert impl._coder().__name__.endswith(name)
    impl._coder.cache_clear()


def test_native_refusals():
    native = pytest.importorskip("hunyuan_fast._C")
    if not hasattr(native, "fp8_attention_hopper"):
        pytest.skip("the native module was built without CUDA")
    x = torch.zeros(1, 8, 2, 128)
    codes = [x] * 7
    with pytest.raises(ValueError, match="out must be on a CUDA device"):
        native.fp8_attention_hopper(*codes, None, x, 1, 0)
    with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
        native.fp8_attention_hopper(*codes, None, x.double(), 1, 0)
    with pytest.raises(ValueError, match="cluster must be 1 or 2, got 4"):
        native.fp8_attention_hopper(*codes, None, x, 4, 0)


# ---- machine code


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


@pytest.mark.skipif(nvcc() is None or disassembler() is None, reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_machine_code_is_what_was_meant(source):
    """Hopper's products and copies, as many as are written, and what overlaps what."""
    assert not re.findall(r"C75\d\d", build(source, "90a").log), "the compiler gave something up"
    codes = machine_code(source, "90a")
    assert len(codes) == 2
    for name, code in codes.items():
        check_machine_code(code, int(re.search(r"Li(\d)E", name).group(1)))
    for other in machine_code(source, "80").values():
        assert "MMA" not in other and "BPT.TRAP" in other


def check_machine_code(code: str, cluster: int) -> None:
    product = r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3 R\d+, "
    # four instructions each: the first scores and those of the loop, its values and the last
    assert len(re.findall(product + r"gdesc\[", code)) == 8
    assert len(re.findall(product + r"R\d+, gdesc\[", code)) == 8
    assert len(re.findall(product + r"\S+ \S*\s*(?:gdesc\S+, )?RZ, !UPT", code)) == 4
    assert len(re.findall(r"UTMALDG\.4D", code)) == 4  # two queries, keys, values
    assert len(re.findall(r"UTMALDG\.4D\.MULTICAST", code)) == (2 if cluster == 2 else 0)
    for once in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
        assert code.count(once) == 1, once
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < MOST_REGISTERS
    # four waits: the first scores, the loop's scores and values, the last values
    parts = re.split(r"WARPGROUP\.DEPBAR", code)
    assert len(parts) == 5
    # the loop exponentiates after the scores' wait, before the values', which it codes after
    assert len(re.findall(r"MUFU\.EX2", parts[2])) == 64 + 2
    assert not re.search(r"SHFL\.IDX|STS", parts[2] + parts[3]), "probabilities do not move"
    assert len(re.findall(r"F2FP\.SATFINITE\.E4M3", code)) == 2 * 32


# ---- on a GPU


def on_hopper() -> bool:
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return here and "cuda_impl" in implementations(ROOM)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs an sm_90 GPU and a build for it")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, dtype, impl, generator):
    length, lengths = CASES[case]
    call = drawn(generator, length, lengths, heads=2, dtype=dtype).map(lambda x: x.cuda())
    judge("cuda_impl", impl.forward(*call.arguments), call)
    gpu.assert_same_bits_at_every_run(lambda: [impl.forward(*call.arguments)])


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs an sm_90 GPU and a build for it")
def test_a_long_sequence_on_a_gpu(impl, generator):
    length = gpu.size(6000, 200)
    call = drawn(generator, length, (length - 3,), outliers=10.0).map(lambda x: x.cuda())
    cosine, relative = errors(impl.forward(*call.arguments), call)
    assert cosine > 0.9999 and relative < gpu.size(0.01, 0.02)  # fewer keys cancel less
