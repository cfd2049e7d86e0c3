"""The gradients of attention on Hopper: emulated, their machine code, on a GPU."""

import importlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations
from tests.kit import gpu, hopper
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.inputs import with_layout
from tests.kit.native import (
    ARCHITECTURES,
    ROOT,
    assert_no_spills,
    build,
    disassembler,
    machine_code,
    nvcc,
)
from tests.kit.numerics import assert_as_good_as, assert_equal
from tests.ops.test_rope3d_attention_sm90 import words_between

ROOM = "rope3d_attention"
DRIVER = ROOT / "tests/native/hopper_attention_backward.cpp"
SOURCES = sorted((ROOT / "csrc/rope3d_attention").glob("sm90_backward_*.cu"))
# Registers of a consumer and of the others: as given in sm90_backward.cuh.
MOST_REGISTERS, FEW_REGISTERS = 240, 24

# length, then lengths: tiles hold 128 keys, and 80 or 128 queries.
CASES = {
    "one token, and some": (40, [1, 40]),
    "a tile less one": (127, [127, 79]),
    "exactly one tile": (128, [128, 80]),
    "past a tile": (129, [129, 81]),
    "none": (40, [0]),
    "every kind": (300, [0, 1, 300, 137]),
    "many tiles": (545, [545, 512]),
}

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
each_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
needs_compiler = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def impl():
    """The implementation itself: the dispatcher does not load it in a build without CUDA."""
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    return importlib.import_module(f"hunyuan_fast.kernels.{ROOM}.cuda_impl")


class Emulator:
    """What ``_C`` has of the kernels for gradients, on the emulated machine."""

    def __init__(self, headers: Path = ROOT / "csrc") -> None:
        self._kernels = hopper.build(DRIVER, headers)
        self.seed = 0
        self.processors = 3

    def rope3d_attention_backward_workspace_hopper(self, q: Tensor) -> int:
        size = torch.zeros(1, dtype=torch.int64)
        self._kernels.run("attention_backward_workspace", list(q.shape), size)
        return int(size)

    def rope3d_attention_backward_hopper(self, *arguments: Tensor | float | None) -> None:
        dout, out, lse, q, k, v, kv_len, scale, dq, dk, dv, workspace, _, *own = arguments
        q_len = own[0] if own else None
        for garbage in (dq, dk, dv):
            garbage.fill_(torch.nan)
        workspace.fill_(255)
        numbers = [*q.shape, q.dtype == torch.float16, words_between(kv_len)]
        rows = (q, k, v, out, dout, dq, dk, dv)
        for x in rows:
            numbers += x.stride()[:3]
        numbers += [k.shape[1], words_between(q_len)]
        self._kernels.run(
            "attention_backward",
            *(*rows, lse, kv_len, q_len, workspace, float(scale), numbers),
            seed=self.seed,
            processors=self.processors,
        )


@pytest.fixture
def emulated(impl, monkeypatch) -> Emulator:
    """In the place of the native functions, and of a device to call them on."""
    emulator = Emulator()
    monkeypatch.setattr(impl, "_C", emulator)
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return emulator


class Call:
    """Arguments of backward, with garbage in the padding, and what is right for them."""

    def __init__(
        self,
        generator: torch.Generator,
        length: int,
        lengths: list[int],
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        heads: int = 2,
        sharpness: float = 1.0,
        garbage: float = torch.nan,
        device: str = "cpu",
    ) -> None:
        shape = (len(lengths), length, heads, head_dim)
        clean = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
        clean[0] *= sharpness
        self.lengths, self.scale, self._clean = lengths, head_dim**-0.5, clean
        q, k, v, _ = clean
        self.out, self.lse = FlashAttention().forward(q, k, v, lengths, self.scale)
        self.rows = []
        for x in (*clean, self.out):
            spoiled = x.clone()
            for item, valid in enumerate(lengths):
                spoiled[item, valid:] = garbage
            self.rows.append(spoiled.to(device))
        self.kv_len = torch.tensor(lengths, device=device)

    def make_scores_low(self) -> None:
        """So low that a score of zero would have a probability beyond all numbers."""
        q, k, v, _, out = self.rows
        q.abs_()
        torch.mul(k.abs(), -40, out=k)
        result, self.lse = FlashAttention().forward(q, k, v, self.lengths, self.scale)
        out.copy_(result)
        for item, valid in enumerate(self.lengths):
            assert self.lse[item, :, :valid].max() < -90

    def arguments(self, change: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> tuple:
        q, k, v, dout, out = map(change, self.rows)
        return dout, out, self.lse.to(q.device), q, k, v, self.kv_len, self.scale

    def assert_right(self, gradients: tuple[Tensor, ...]) -> None:
        """As near the truth as a kernel with these roundings can be."""
        q, k, v, dout = self._clean
        exact, same_dtype = self._plain(torch.float64), self._plain(q.dtype)
        golden = FlashAttention().backward(
            dout, self.out, self.lse, q, k, v, self.lengths, self.scale
        )
        for name, result, *wanted in zip(
            ("dq", "dk", "dv"), gradients, exact, same_dtype, golden, strict=True
        ):
            assert_as_good_as(result.cpu(), *wanted, name=name, factor=2.0, rms_factor=1.15)

    def _plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v, dout = (x.to(dtype, copy=True) for x in self._clean)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, _ = plain_attention(*leaves, self.lengths, self.scale)
        return torch.autograd.grad(out, leaves, dout)


# ---- emulated


@needs_compiler
@each_dtype
@each_head_dim
@pytest.mark.parametrize("case", CASES)
def test_emulated(case, head_dim, dtype, impl, emulated, generator):
    call = Call(generator, *CASES[case], head_dim, dtype)
    emulated.seed = head_dim + len(case)
    call.assert_right(impl.backward(*call.arguments()))


@needs_compiler
@each_dtype
@pytest.mark.parametrize("sharpness", [6.0, 0.01])
def test_sharp_and_flat_scores(sharpness, dtype, impl, emulated, generator):
    call = Call(generator, 210, [210, 133], 128, dtype, heads=1, sharpness=sharpness)
    call.assert_right(impl.backward(*call.arguments()))


@needs_compiler
@each_head_dim
def test_keys_that_are_not_there_score_higher_than_all(head_dim, impl, emulated, generator):
    """Zeros in their place would have probabilities beyond all numbers."""
    call = Call(generator, 90, [77], head_dim, torch.float16, heads=1)
    call.make_scores_low()
    for gradient in impl.backward(*call.arguments()):
        assert gradient.isfinite().all()


@needs_compiler
@each_head_dim
@pytest.mark.parametrize("seed", [*hopper.EXTREMES, 4, 5, 6, 7])
def test_the_order_of_things_does_not_matter(seed, head_dim, impl, emulated, generator):
    """Copies and products early or late, blocks in any order, as many as may be: same bits."""
    call = Call(generator, 300, [300, 137, 0, 1], head_dim, heads=1)
    expected = impl.backward(*call.arguments())
    emulated.seed, emulated.processors = seed, (1, 2, 5, 200)[seed % 4]
    for result, wanted in zip(impl.backward(*call.arguments()), expected, strict=True):
        assert_equal(result, wanted)


@needs_compiler
@pytest.mark.parametrize("garbage", [torch.inf, 1e30, 0.0])
def test_padding_is_never_felt(garbage, impl, emulated, generator):
    seed = generator.initial_seed()
    results = []
    for value in (torch.nan, garbage):
        call = Call(generator.manual_seed(seed), 150, [150, 91, 0], 64, garbage=value)
        results.append(impl.backward(*call.arguments()))
    for result, wanted in zip(*results, strict=True):
        assert_equal(result, wanted)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_width(dtype, impl, emulated, generator):
    """Of any stride, and out of bounds: those on a GPU are not looked at by the host."""
    call = Call(generator, 70, [40, 0, 70], 64)
    expected = impl.backward(*call.arguments())
    strided = torch.tensor([[40, 9], [-3, 9], [2**31 - 1, 9]], dtype=dtype)[:, 0]
    for call.kv_len in (strided, strided.contiguous()):
        for result, wanted in zip(impl.backward(*call.arguments()), expected, strict=True):
            assert_equal(result, wanted)


@needs_compiler
def test_no_lengths_mean_full_lengths(impl, emulated, generator):
    call = Call(generator, 130, [130, 130], 128, heads=1)
    expected = impl.backward(*call.arguments())
    call.kv_len = None
    for result, wanted in zip(impl.backward(*call.arguments()), expected, strict=True):
        assert_equal(result, wanted)


def _fused(x: Tensor) -> Tensor:
    """One of three of a packed projection."""
    batch, length, heads, width = x.shape
    packed = torch.full((batch, length, 3, heads, width), torch.nan, dtype=x.dtype)
    return packed[:, :, 1].copy_(x)


@needs_compiler
@pytest.mark.parametrize("layout", ["fused", "transposed", "sliced", "offset_by_one"])
def test_strides_do_not_matter(layout, impl, emulated, generator):
    call = Call(generator, 85, [85, 33], 64)
    expected = impl.backward(*call.arguments())
    change = _fused if layout == "fused" else lambda x: with_layout(x, layout)
    for result, wanted in zip(impl.backward(*call.arguments(change)), expected, strict=True):
        assert_equal(result, wanted)


@needs_compiler
def test_the_gradient_of_a_sum_may_have_strides_of_zero(impl, emulated, generator):
    call = Call(generator, 50, [50], 64)
    call.rows[3] = torch.ones((), dtype=torch.bfloat16).expand(1, 50, 2, 64)
    results = impl.backward(*call.arguments(lambda x: x))
    for result, wanted in zip(results, impl.backward(*call.arguments()), strict=True):
        assert_equal(result, wanted)


@needs_compiler
def test_a_nan_stays_in_its_sample_and_head(impl, emulated, generator):
    call = Call(generator, 90, [90, 90], 64)
    call.rows[1][0, 3, 0, 2] = torch.nan
    for gradient in impl.backward(*call.arguments()):
        assert gradient[0, :, 0].isnan().any()
        assert gradient[0, :, 1].isfinite().all()
        assert gradient[1].isfinite().all()


@needs_compiler
def test_blocks_take_every_tile_of_keys_once_and_in_order(generator, impl, emulated):
    """However many sequences go side by side: with one processor one, with 200 all."""
    call = Call(generator, 260, [260, 257, 0], 64, heads=3)
    results = []
    for emulated.processors in (1, 3, 20):
        results.append(impl.backward(*call.arguments()))
    for several, first in itertools.product(results[1:], results[:1]):
        for result, wanted in zip(several, first, strict=True):
            assert_equal(result, wanted)


def test_native_refusals():
    native = pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    if not native.has_cuda:
        pytest.skip("the native module was built without CUDA")
    q = torch.zeros(1, 5, 2, 96, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head dimension must be 64 or 128, got 96"):
        native.rope3d_attention_backward_workspace_hopper(q)
    q = torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16)
    lse, space = torch.zeros(1, 2, 5), torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="q must be on a CUDA device"):
        native.rope3d_attention_backward_hopper(
            q, q, lse, q, q, q, None, 0.125, q, q, q, space, 0, None
        )


# ---- machine code


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


@pytest.mark.skipif(nvcc() is None or disassembler() is None, reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_machine_code_is_what_was_meant(source):
    """Hopper's products, as many as are written, and registers that change hands."""
    assert not re.findall(r"C75\d\d", build(source, "90a").log), "the compiler gave something up"
    kind = "F32.BF16" if source.stem.endswith("bf16") else "F32"
    codes = {name: x for name, x in machine_code(source, "90a").items() if "backward_kern" in name}
    assert len(codes) == 2
    for name, code in codes.items():
        wide = "Li128" in name
        shared, along_m, registers = (80, 80, 128) if wide else (128, 64, 64)
        # scores and dP of the first step and of the loop; dq in both steps and at the end
        products = {
            rf"{shared}x16\.{kind} R\d+, gdesc\[UR\d+\], ": 2 * 2 * (8 if wide else 4),
            rf"{along_m}x16\.{kind} R\d+, gdesc\[UR\d+\]\.tnspA, ": 3 * 8,
            rf"{registers}x16\.{kind} R\d+, R\d+, gdesc\[UR\d+\]\.tnspB, ": 2
            * 2
            * (5 if wide else 8),
        }
        for pattern, count in products.items():
            assert len(re.findall(rf"HGMMA\.64x{pattern}", code)) == count, pattern
        assert code.count("HGMMA") == sum(products.values())
        assert code.count("UBLKRED") == 1
        for once in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
            assert code.count(once) == 1, once
        assert not re.search(r"\b(LDL|STL|HMMA)\b", code)
        assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < MOST_REGISTERS
        others = code[code.index("USETMAXREG.DEALLOC") : code.rindex("EXIT")]
        assert max(map(int, re.findall(r"\bR(\d+)\b", others))) < FEW_REGISTERS
    for name, code in machine_code(source, "80").items():
        if "backward_kern" in name:
            assert "HMMA" not in code and "BPT.TRAP" in code


# ---- on a GPU


def on_hopper() -> bool:
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return here and "cuda_impl" in implementations(ROOM)


hopper_gpu = pytest.mark.skipif(not on_hopper(), reason="needs an sm_90 GPU and a build for it")


@pytest.mark.gpu
@hopper_gpu
@each_dtype
@each_head_dim
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, head_dim, dtype, impl, generator):
    call = Call(generator, *CASES[case], head_dim, dtype, device="cuda")
    gradients = impl.backward(*call.arguments())
    call.assert_right(gradients)
    gpu.assert_same_bits_at_every_run(lambda: impl.backward(*call.arguments()))


@pytest.mark.gpu
@hopper_gpu
@each_head_dim
def test_many_blocks_on_a_gpu(head_dim, impl, generator):
    """Several for every multiprocessor, which wait for each other's shares of dq: same bits."""
    length = gpu.size(9000, 200)
    shape = (1, length, gpu.size(8, 1), head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator).cuda().bfloat16() for _ in range(4))
    kv_len = torch.tensor([length - 100], device="cuda")
    out, lse = impl.forward(q, k, v, kv_len, head_dim**-0.5)
    given = dout, out, lse, q, k, v, kv_len, head_dim**-0.5
    first = impl.backward(*given)
    gpu.assert_same_bits_at_every_run(lambda: impl.backward(*given), gpu.FEW)
    library = importlib.import_module(f"hunyuan_fast.kernels.{ROOM}.library_impl")
    expected = library.backward(*given)
    for result, wanted in zip(first, expected, strict=True):
        difference = (result.float() - wanted.float()).norm() / wanted.float().norm()
        assert difference < 0.02
