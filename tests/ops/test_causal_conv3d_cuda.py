"""The Hopper kernel of the causal convolutions: emulated, its machine code, on a GPU."""

import importlib
import itertools
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import causal_conv3d
from tests.kit import gpu
from tests.kit.hopper import EXTREMES
from tests.kit.native import (
    ARCHITECTURES,
    ROOT,
    assert_no_spills,
    build,
    disassembler,
    machine_code,
    nvcc,
)
from tests.kit.numerics import assert_equal, assert_rounded_once
from tests.ops.causal_conv3d_cases import (
    ROOM,
    Call,
    apply,
    assert_right,
    by_definition,
    draw_call,
    run,
)
from tests.ops.hopper_emulator import check, emulated, native, real_sources

__all__ = ["emulated", "native", "real_sources"]  # fixtures

# Tiles hold 128 positions by 256 channels, or 256 by 128: none of these divides what follows.
CASES = {
    "every edge": {"shape": (2, 64, 3, 5, 6)},
    "wide": {"shape": (1, 64, 2, 5, 14), "channels": 256},
    "three tiles of rows": {"shape": (1, 64, 3, 13, 14), "kernel": (1, 3, 3)},
    "tiles both ways": {"shape": (1, 64, 2, 9, 15), "channels": 512, "kernel": (1, 1, 3)},
    "a last tile half full": {"shape": (1, 64, 1, 5, 4), "channels": 320, "kernel": (1, 3, 1)},
    "many channels": {"shape": (1, 320, 1, 4, 5), "channels": 192, "kernel": (3, 1, 3)},
    "one row, past": {"shape": (1, 64, 2, 1, 7), "past": 2},
    "long past": {"shape": (2, 64, 2, 3, 4), "past": 3},
    "nothing before": {"shape": (1, 64, 4, 3, 2), "past": 0},
    "image": {"shape": (1, 128, 1, 6, 5)},
    "one pixel": {"shape": (1, 64, 1, 1, 1)},
    "stride in space": {"shape": (1, 64, 3, 5, 6), "stride": (1, 2, 2)},
    "stride": {"shape": (1, 64, 5, 4, 7), "stride": (2, 2, 2)},
    "stride, past": {"shape": (1, 64, 4, 6, 1), "stride": (2, 2, 2), "past": 1},
    "pointwise": {"shape": (2, 192, 2, 5, 4), "kernel": 1},
    "pointwise, stride": {"shape": (1, 64, 4, 5, 4), "kernel": 1, "stride": (2, 2, 2)},
    "long rows of taps": {"shape": (1, 64, 2, 3, 9), "kernel": (1, 5, 5)},
    "doubled": {"shape": (2, 64, 3, 3, 4), "factor": (2, 2, 2)},
    "doubled, past": {"shape": (1, 64, 2, 1, 4), "factor": (2, 2, 2), "past": 1},
    "doubled in space": {"shape": (1, 64, 3, 3, 1), "factor": (1, 2, 2)},
    "doubled in space, past": {"shape": (1, 64, 2, 2, 3), "factor": (1, 2, 2), "past": 2},
    "doubled in space, one before": {"shape": (1, 64, 2, 2, 3), "factor": (1, 2, 2), "past": 1},
    "doubled in time": {"shape": (1, 64, 3, 2, 3), "factor": (2, 1, 1)},
    "doubled image": {"shape": (1, 64, 1, 3, 2), "factor": (2, 2, 2)},
}
SOURCES = sorted((ROOT / "csrc/causal_conv3d").glob("*.cu"))
INSTRUCTIONS = ROOT / "tests/native/sm90.cu"


@pytest.fixture
def impl():
    """The implementation itself: the dispatcher does not load it in a build without CUDA."""
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    return importlib.import_module(f"hunyuan_fast.kernels.{ROOM}.cuda_impl")


def draw(generator: torch.Generator, options: dict) -> Call:
    return draw_call(generator, **{"channels": 64, "dtype": torch.bfloat16} | options)


def assert_forward_right(y: torch.Tensor, call: Call) -> None:
    """With the gradients of the library, for they are judged together."""
    assert_right([y, *run("library_impl", call)[1:]], call)


# ---- emulated


@pytest.mark.parametrize("least", [1, 1 << 30], ids=["added", "apart"])
@pytest.mark.parametrize("case", CASES)
def test_emulated(case, least, impl, emulated, generator, monkeypatch):
    """With taps that meet the first frame together added up, and without."""
    call = draw(generator, CASES[case])
    if least == 1 and (call.past is not None or call.weight.shape[2] == 1):
        pytest.skip("no taps meet")
    monkeypatch.setattr(impl, "_WORTH_A_KERNEL", least)
    assert_forward_right(impl.forward(*call.arguments), call)


@pytest.mark.parametrize("case", ["every edge", "wide", "long past", "doubled, past"])
def test_the_sources_run_on_the_emulated_machine(case, impl, real_sources, generator):
    """Barriers, copies and products as in the kernel, early and late."""
    call = draw(generator, CASES[case])
    expected = None
    for real_sources.seed in (*EXTREMES, 5):
        y = impl.forward(*call.arguments)
        expected = y if expected is None else expected
        assert_equal(y, expected)
    assert_forward_right(expected, call)


def test_taps_that_meet_the_first_frame_take_launches_of_their_own(impl, emulated, generator):
    call = draw(generator, {"shape": (1, 64, 4, 2, 3)})
    impl.forward(*call.arguments)
    assert emulated.launches == 1
    impl.forward(*draw(generator, {"shape": (1, 64, 1, 2, 3)}).arguments)
    assert emulated.launches == 2
    impl.forward(*draw(generator, {"shape": (1, 64, 2, 2, 3), "factor": (1, 2, 2)}).arguments)
    assert emulated.launches == 6 + 4  # two frames of each parity, which are all there are


@pytest.mark.parametrize("bias", [True, False])
def test_the_residual_is_added_before_the_rounding(bias, impl, emulated, generator):
    options = {"shape": (1, 64, 2, 3, 5), "channels": 128, "past": 2, "bias": bias}
    call = draw(generator, options)
    residual = torch.randn(call.dy.shape, generator=generator).bfloat16()
    got = impl.forward(*call.arguments, residual=residual)
    exact = by_definition(call.map(torch.Tensor.double)) + residual.double()
    single = by_definition(call.map(torch.Tensor.float)) + residual.float()
    assert_rounded_once(got, exact, single)


def test_strides_do_not_matter(impl, emulated, generator):
    """Of maps and of the weight, and a bias at any address."""
    call = draw(generator, {"shape": (2, 64, 2, 3, 4), "past": 2})
    expected = impl.forward(*call.arguments)
    wide = torch.randn(2, 3, 3, 4, 200, generator=generator).bfloat16().movedim(-1, 1)
    room = torch.zeros(65, dtype=torch.bfloat16)
    changes = (
        torch.Tensor.contiguous,
        lambda t: wide[:, 8:72, : t.shape[2]].copy_(t) if t is call.x else t,
        lambda t: wide[:, 3:67, : t.shape[2]].copy_(t) if t is call.x else t,
        lambda t: room[1:].copy_(t) if t is call.bias else t,
        lambda t: t.transpose(3, 4).contiguous().transpose(3, 4) if t is call.weight else t,
    )
    for change in changes:
        assert_equal(impl.forward(*call.map(change).arguments), expected)


@pytest.mark.parametrize("past", [None, 2])
def test_a_nan_reaches_its_neighbours_only(past, impl, emulated, generator):
    call = draw(generator, {"shape": (2, 64, 3, 6, 7), "past": past})
    call.x[0, :, 0, 3, 3] = torch.nan
    is_nan = impl.forward(*call.arguments).isnan()
    assert is_nan[0, :, :, 2:5, 2:5].all()
    assert is_nan.sum() == is_nan[0, :, :, 2:5, 2:5].numel()


def test_shared_memory_is_written_and_read_without_conflicts(native):
    check(native.bank_conflicts())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_nobody_waits_for_ever_or_reads_too_early(steps, native):
    for tiles, seed in itertools.product((1, 2, 5), range(10)):
        check(native.ring(tiles, steps, seed))


# ---- refusals


def test_refusals(impl, generator, monkeypatch):
    call = draw(generator, {"shape": (1, 64, 2, 2, 2)})
    x, weight, *rest = call.arguments

    def reason(x=x, weight=weight, **more):
        return impl.supports(x, weight, *rest, **more)

    vector = torch.zeros(1, 64)
    assert "it is on cpu" in reason()
    assert "no scale and shift" in reason(scale=vector, shift=vector)
    assert "it is torch.float32" in reason(x.float())
    assert "C is 16 and O is 64" in reason(weight=weight[:, :16])
    assert "C is 64 and O is 3" in reason(weight=weight[:3])
    assert "at most 27 taps" in reason(weight=weight.new_zeros(64, 64, 4, 3, 3))
    assert "must have samples" in reason(x[:0])
    wide = x[:1, :, :1, :1, :1].expand(4, 64, 3, 2**14, 2**14)
    assert "there are 3221225472" in reason(wide)
    with FakeTensorMode():
        on_gpu = torch.empty(1, 64, 2, 2, 2, device="cuda", dtype=torch.float16)
        for capability, words in {(8, 0): "it is sm_80", (10, 0): "it is sm_100"}.items():
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            assert words in reason(on_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        assert reason(on_gpu) is None


def test_native_refusals():
    native = pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    if not native.has_cuda:
        pytest.skip("the native module was built without CUDA")
    with pytest.raises(ValueError, match="multiples of 64, got C = 16 and O = 64"):
        native.causal_conv3d_packed_size_hopper(64, 16, (3, 3, 3))
    assert native.causal_conv3d_packed_size_hopper(192, 128, (1, 2, 3)) == 256 * 128 * 6
    x = torch.zeros(1, 64, 2, 3, 4, dtype=torch.bfloat16)
    weight, packed = x.new_zeros(64, 64, 1, 1, 1), x.new_zeros(128 * 64)
    spans = [[(0, 1)]] * 3
    with pytest.raises(ValueError, match="weight must be on a CUDA device"):
        native.causal_conv3d_pack_hopper(weight, spans, packed, 0)
    with pytest.raises(ValueError, match="weight must be bfloat16 or float16"):
        native.causal_conv3d_pack_hopper(weight.float(), spans, packed, 0)
    ones = (1, 1, 1)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        native.causal_conv3d_forward_hopper(x, None, packed, None, None, x, *[ones] * 3, 0)


# ---- machine code


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", [*SOURCES, INSTRUCTIONS], ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


HOPPER = [path for path in SOURCES if "forward" in path.stem]


@pytest.mark.skipif(nvcc() is None or disassembler() is None, reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize("source", HOPPER, ids=lambda path: path.stem)
def test_the_machine_code_is_what_was_meant(source):
    """Hopper's products and copies, as many as are written, and registers that change hands."""
    assert not re.findall(r"C75\d\d", build(source, "90a").log), "the compiler gave something up"
    kind = "BF16" if source.stem.endswith("bf16") else "F16"
    codes = machine_code(source, "90a")
    assert len(codes) == 2
    for name, code in codes.items():
        columns, products, copies = (256, 4, 8) if "Li256" in name else (128, 8, 16)
        shape = "F32.BF16" if kind == "BF16" else "F32"
        assert len(re.findall(rf"HGMMA\.64x{columns}x16\.{shape} ", code)) == products
        assert len(re.findall(r"LDGSTS\S*\.128 ", code)) == copies
        for once in ("UBLKCP", "ARRIVES.LDGSTSBAR", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
            assert code.count(once) == 1, once
        assert not re.search(r"\b(LDL|STL|HMMA)\b", code)
        # what the roles were given: kConsumerRegisters in sm90_forward.cuh
        assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < 216
    for code in machine_code(source, "80").values():
        assert "HMMA" not in code and "BPT.TRAP" in code


# ---- on a GPU


def on_hopper() -> bool:
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return here and "cuda_impl" in implementations(ROOM)


hopper = pytest.mark.skipif(not on_hopper(), reason="needs an sm_90 GPU and a build for it")
LARGE = {
    "128 channels": {"shape": (1, 128, 5, 90, 160), "channels": 128},
    "256 to 128": {"shape": (1, 256, 3, 90, 161), "channels": 128, "past": 2},
    "512 channels": {"shape": (1, 512, 3, 45, 80), "channels": 512},
    "first frames apart": {"shape": (1, 64, 3, 260, 256), "channels": 64},
    "doubled": {"shape": (2, 256, 4, 33, 47), "channels": 256, "factor": (2, 2, 2)},
    "stride": {"shape": (1, 256, 5, 64, 64), "channels": 256, "stride": (2, 2, 2)},
    "pointwise": {"shape": (1, 256, 3, 90, 161), "channels": 128, "kernel": 1},
}


@pytest.mark.gpu
@hopper
def test_each_instruction_on_a_gpu(tmp_path):
    """Products, copies and barriers alone: where the kernel is wrong, this says what of it."""
    gpu.run_program(tmp_path, INSTRUCTIONS)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("least", [1, 1 << 30], ids=["added", "apart"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, least, dtype, impl, generator, monkeypatch):
    monkeypatch.setattr(impl, "_WORTH_A_KERNEL", least)
    call = draw(generator, CASES[case] | {"dtype": dtype}).map(torch.Tensor.cuda)
    results = run("cuda_impl", call)
    assert_right(results, call)
    gpu.assert_same_bits_at_every_run(lambda: [impl.forward(*call.arguments)], gpu.MANY)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", LARGE)
def test_layers_on_a_gpu(case, dtype, generator):
    """Many tiles for every multiprocessor, against the truth in float64 on the same GPU."""
    small = gpu.size({}, {"shape": (1, LARGE[case]["shape"][1], 2, 3, 4)})
    call = draw(generator, LARGE[case] | {"dtype": dtype} | small).map(torch.Tensor.cuda)
    exact = by_definition(call.map(torch.Tensor.double))
    with use("cuda_impl", ROOM), torch.no_grad():
        y = apply(call)
        gpu.assert_same_bits_at_every_run(lambda: [apply(call)], gpu.FEW)
    error = (y.double() - exact).abs().max()
    # sums of taps are rounded once more than the result
    assert error <= 4 * (exact.to(dtype).double() - exact).abs().max()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("past", [None, 2])
def test_a_residual_on_a_gpu(past, generator):
    shape = gpu.size((2, 128, 3, 17, 33), (1, 64, 3, 2, 3))
    options = {"shape": shape, "channels": 192, "past": past}
    call = draw(generator, options).map(torch.Tensor.cuda)
    residual = torch.randn(call.dy.shape, generator=generator).cuda().bfloat16()
    with use("cuda_impl", ROOM), torch.no_grad():
        y = causal_conv3d(call.x, call.weight, call.bias, past=call.past, residual=residual)
    exact = by_definition(call.map(torch.Tensor.double)) + residual.double()
    single = by_definition(call.map(torch.Tensor.float)) + residual.float()
    assert_rounded_once(y, exact, single)


@pytest.mark.gpu
@pytest.mark.whole_gpu
@hopper
def test_past_two_to_the_31_on_a_gpu(generator):
    """A map of more than 2^31 elements equals its parts; frames see each other not at all."""
    weight = torch.randn(64, 64, 1, 3, 3, generator=generator).div(24).cuda().bfloat16()
    size = (1, 64, 10, *gpu.size((2048, 2048), (3, 5)))
    layout = torch.channels_last_3d
    x = torch.empty(size, device="cuda", dtype=torch.bfloat16, memory_format=layout).normal_()
    assert gpu.rehearsed or x.numel() > 2**31
    with use("cuda_impl", ROOM), torch.no_grad():
        whole = causal_conv3d(x, weight)
        for frame in (0, 7, 8, 9):
            part = slice(frame, frame + 1)
            assert torch.equal(whole[:, :, part], causal_conv3d(x[:, :, part], weight))
