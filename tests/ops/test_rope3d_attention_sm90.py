"""The Hopper kernels of attention: emulated, their machine code, on a GPU."""

import importlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops.rope3d_attention import attention
from tests.kit import gpu, hopper
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.inputs import with_layout
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
from tests.kit.numerics import assert_as_good_as, assert_equal

ROOM = "rope3d_attention"
DRIVER = ROOT / "tests/native/hopper_attention.cpp"
SOURCES = sorted((ROOT / "csrc/rope3d_attention").glob("sm90_forward_*.cu"))
OPERANDS = ROOT / "tests/native/sm90_operands.cu"
TENSOR_MAP = ROOT / "csrc/common/sm90_tensor_map.cu"
# Keys of a tile, and how many blocks share what they fetch.
WAYS = list(itertools.product((128, 176), (1, 2)))
# Registers of a consumer: kConsumerRegisters in sm90_forward.cuh.
MOST_REGISTERS = 224

# length, then lengths: tiles hold 128 queries, and 128 or 176 keys.
CASES = {
    "one token": (1, [1]),
    "a tile less one": (127, [127, 126]),
    "exactly one tile": (128, [128]),
    "two tiles and none": (256, [256, 0]),
    "past a wide tile": (177, [177, 176, 175]),
    "every kind": (300, [0, 1, 300, 129]),
    "many tiles": (705, [705, 528]),
}

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
each_way = pytest.mark.parametrize(("key_tile", "cluster"), WAYS, ids=str)
needs_compiler = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def impl():
    """The implementation itself: the dispatcher does not load it in a build without CUDA."""
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    return importlib.import_module(f"hunyuan_fast.kernels.{ROOM}.cuda_impl")


def words_between(lengths: Tensor | None) -> int:
    """From one number to the next, in 32-bit words."""
    return 0 if lengths is None else lengths.stride(0) * lengths.element_size() // 4


class Emulator:
    """What ``_C`` has of the Hopper kernels, on the emulated machine."""

    def __init__(self, headers: Path = ROOT / "csrc") -> None:
        self._kernels = hopper.build(DRIVER, headers)
        self.seed = 0
        self.processors = 3

    def rope3d_attention_forward_hopper(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor | None,
        scale: float,
        out: Tensor,
        lse: Tensor,
        key_tile: int,
        cluster: int,
        _: int,
        q_len: Tensor | None = None,
    ) -> None:
        numbers = [*q.shape, key_tile, q.dtype == torch.float16, words_between(kv_len)]
        for x in (q, k, v, out):
            numbers += x.stride()[:3]
        numbers += [cluster, k.shape[1], words_between(q_len)]
        self._kernels.run(
            "attention_forward",
            *(q, k, v, kv_len, q_len, out, lse, float(scale), numbers),
            seed=self.seed,
            processors=self.processors,
        )


@pytest.fixture
def emulated(impl, monkeypatch) -> Emulator:
    """In the place of the native functions, and of a device to call them on."""
    return emulated_by(Emulator(), impl, monkeypatch)


def emulated_by(emulator: Emulator, impl, monkeypatch) -> Emulator:
    monkeypatch.setattr(impl, "_C", emulator)
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return emulator


def draw(
    generator: torch.Generator, lengths: list[int], length: int, heads: int, head_dim: int, dtype
) -> list[Tensor]:
    """q, k and v, with NaN in the padding."""
    shape = (len(lengths), length, heads, head_dim)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    for x in inputs:
        for item, valid in enumerate(lengths):
            x[item, valid:] = torch.nan
    return inputs


def assert_right(out: Tensor, lse: Tensor, inputs: list[Tensor], lengths: list[int], scale: float):
    """As near the truth as a kernel with these roundings can be."""
    inputs = [x.cpu() for x in inputs]
    exact, exact_lse = plain_attention(*(x.double() for x in inputs), lengths, scale)
    same_dtype, _ = plain_attention(*inputs, lengths, scale)
    golden, _ = FlashAttention().forward(*inputs, lengths, scale)
    assert_as_good_as(out.cpu(), exact, same_dtype, golden, name="out", factor=2.0, rms_factor=1.15)
    lse = lse.cpu()
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    error = (lse - exact_lse)[exact_lse.isfinite()].abs()
    assert not error.numel() or error.max() < 2**-12


# ---- emulated


@needs_compiler
@each_way
@pytest.mark.parametrize("case", CASES)
def test_emulated(case, key_tile, cluster, impl, emulated, generator):
    """Every way meets both head dimensions, and so does every case."""
    length, lengths = CASES[case]
    head_dim = (64, 128)[(list(CASES).index(case) + WAYS.index((key_tile, cluster))) % 2]
    emulated.seed = 4 + key_tile + cluster
    inputs = draw(generator, lengths, length, 2 if length < 300 else 1, head_dim, torch.bfloat16)
    scale = head_dim**-0.5
    kv_len = torch.tensor(lengths)
    out, lse = impl.forward(*inputs, kv_len, scale, key_tile=key_tile, cluster=cluster)
    assert_right(out, lse, inputs, lengths, scale)


@needs_compiler
@each_dtype
@pytest.mark.parametrize("sharpness", [6.0, 0.01])
def test_sharp_and_flat_scores(sharpness, dtype, impl, emulated, generator):
    q, k, v = draw(generator, [400, 290], 400, 1, 64, dtype)
    q = q * sharpness
    out, lse = impl.forward(q, k, v, torch.tensor([400, 290]), 0.125)
    assert_right(out, lse, [q, k, v], [400, 290], 0.125)


@needs_compiler
@pytest.mark.parametrize("seed", [*hopper.EXTREMES, 4, 5])
@pytest.mark.parametrize("processors", [2, 5])
@pytest.mark.parametrize("cluster", [1, 2])
def test_the_order_of_things_does_not_matter(seed, processors, cluster, impl, emulated, generator):
    """Copies and products early or late, some blocks for all items or one for each: same bits."""
    lengths = torch.tensor([0, 1, 260, 129])
    inputs = draw(generator, lengths.tolist(), 260, 1, 64, torch.bfloat16)
    expected = impl.forward(*inputs, lengths, 0.125, key_tile=128, cluster=1)
    emulated.seed, emulated.processors = seed, processors
    results = impl.forward(*inputs, lengths, 0.125, key_tile=128, cluster=cluster)
    for result, wanted in zip(results, expected, strict=True):
        assert_equal(result, wanted)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_width(dtype, impl, emulated, generator):
    """Of any stride, and out of bounds: those on a GPU are not looked at by the host."""
    inputs = draw(generator, [40, 0, 70], 70, 1, 64, torch.float16)
    expected = impl.forward(*inputs, torch.tensor([40, 0, 70]), 0.125)
    strided = torch.tensor([[40, 9], [-3, 9], [2**31 - 1, 9]], dtype=dtype)[:, 0]
    for lengths in (strided, strided.contiguous()):
        for result, wanted in zip(impl.forward(*inputs, lengths, 0.125), expected, strict=True):
            assert_equal(result, wanted)


@needs_compiler
def test_no_lengths_mean_full_lengths(impl, emulated, generator):
    inputs = draw(generator, [130, 130], 130, 1, 64, torch.bfloat16)
    whole = impl.forward(*inputs, None, 0.125)
    for result, wanted in zip(
        impl.forward(*inputs, torch.tensor([130, 130]), 0.125), whole, strict=True
    ):
        assert_equal(result, wanted)


def _fused(x: Tensor) -> Tensor:
    """One of three of a packed projection."""
    batch, length, heads, width = x.shape
    packed = torch.full((batch, length, 3, heads, width), torch.nan, dtype=x.dtype)
    return packed[:, :, 1].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": _fused,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "off by one": lambda x: with_layout(x, "offset_by_one"),
    "features apart": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
}


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout, impl, emulated, generator):
    lengths = torch.tensor([90, 41])
    inputs = draw(generator, [90, 41], 90, 2, 64, torch.bfloat16)
    expected = impl.forward(*inputs, lengths, 0.125)
    moved = [LAYOUTS[layout](x) for x in inputs]
    for result, wanted in zip(impl.forward(*moved, lengths, 0.125), expected, strict=True):
        assert_equal(result, wanted)


@needs_compiler
@pytest.mark.parametrize("gap", [40, 3])
@pytest.mark.parametrize("lengths", [None, [140, 9], [0, 140]], ids=str)
def test_out_may_be_a_view_beside_other_results(lengths, gap, impl, emulated, generator):
    """With rows at multiples of 16 bytes the kernel writes it, else a copy does."""
    q, k, v = draw(generator, lengths or [140, 140], 140, 2, 64, torch.bfloat16)
    kv_len = None if lengths is None else torch.tensor(lengths)
    beside = Fenced((2, 140, 2 * 64), torch.bfloat16, gap=gap)
    view = beside.view.unflatten(-1, (2, 64))
    expected, expected_lse = impl.forward(q, k, v, kv_len, 0.125)
    result, lse = impl.forward(q, k, v, kv_len, 0.125, view)
    assert result is view
    beside.check()
    assert_equal(view, expected)
    assert_equal(lse, expected_lse)


@needs_compiler
def test_what_is_infinite_or_no_number_stays_in_its_row_or_head(impl, emulated, generator):
    q, k, v = draw(generator, [150], 150, 2, 64, torch.bfloat16)
    q[0, 3, 0] = torch.inf
    k[0, 100, 1, 5] = torch.nan
    out, lse = impl.forward(q, k, v, None, 0.125)
    assert out[0, 3, 0].isnan().all()
    assert out[0, :, 1].isnan().all()
    clean = torch.ones(150, dtype=torch.bool)
    clean[3] = False
    assert out[0, clean, 0].isfinite().all()
    assert lse[0, 0, clean].isfinite().all()


@needs_compiler
def test_rows_of_nothing_but_minus_infinity_are_zero(impl, emulated, generator):
    """As the reference has it: no probability at all."""
    q, k, v = draw(generator, [200], 200, 1, 64, torch.bfloat16)
    q[0, 7], k[0, :, 0, 0] = 0, 1
    q[0, 7, 0, 0] = -torch.inf
    out, lse = impl.forward(q, k, v, None, 0.125)
    assert lse[0, 0, 7] == -torch.inf
    assert not out[0, 7].any()


# ---- refusals


def test_refusals(impl, generator, monkeypatch):
    q = torch.zeros(2, 5, 3, 64, dtype=torch.bfloat16)

    def reason(q: Tensor, scale: float = 0.125) -> str | None:
        return impl.supports(q, q, q, None, scale)

    assert "it is on cpu" in reason(q)
    assert "it is torch.float32" in reason(q.float())
    assert "it is 32" in reason(q[..., :32])
    assert "must not be empty" in reason(q[:0])
    assert "scale must be positive, it is -1" in reason(q, -1.0)
    assert "there are 4294967296" in reason(q[:1, :1, :1].expand(2**15, 2**14, 2**10, 64))
    with FakeTensorMode():
        on_gpu = torch.empty(1, 8, 2, 128, device="cuda", dtype=torch.float16)
        for capability, words in {(8, 0): "it is sm_80", (10, 0): "it is sm_100"}.items():
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            assert words in reason(on_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        assert reason(on_gpu) is None


def test_native_refusals():
    native = pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    if not native.has_cuda:
        pytest.skip("the native module was built without CUDA")
    q = torch.zeros(2, 5, 3, 64, dtype=torch.bfloat16)
    lse = torch.zeros(2, 3, 5)

    def call(q=q, scale=0.125, key_tile=128, cluster=1):
        options = (scale, q, lse, key_tile, cluster, 0, None)
        native.rope3d_attention_forward_hopper(q, q, q, None, *options)

    with pytest.raises(ValueError, match="k must be on a CUDA device"):
        call()
    with pytest.raises(ValueError, match="must be bfloat16 or float16"):
        call(q.float())
    with pytest.raises(ValueError, match="must be 64 or 128, got 32"):
        call(q[..., :32])
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        call(scale=0.0)
    with pytest.raises(ValueError, match="key_tile must be 128 or 176, got 64"):
        call(key_tile=64)
    with pytest.raises(ValueError, match="cluster must be 1 or 2, got 4"):
        call(cluster=4)


# ---- machine code


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", [*SOURCES, OPERANDS], ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


@pytest.mark.skipif(nvcc() is None or disassembler() is None, reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_machine_code_is_what_was_meant(source):
    """Hopper's products and copies, as many as are written, and what overlaps what."""
    assert not re.findall(r"C75\d\d", build(source, "90a").log), "the compiler gave something up"
    codes = machine_code(source, "90a")
    assert len(codes) == 2 * len(WAYS)
    for name, code in codes.items():
        shape = re.search(r"ShapeILi(\d+)ELi(\d+)ELi(\d)E", name).groups()
        head_dim, keys, cluster = map(int, shape)
        kind = "F32.BF16" if source.stem.endswith("bf16") else "F32"
        # the first or last product of an item, and those of the loop
        scores = re.findall(rf"HGMMA\.64x{keys}x16\.{kind} R\d+, gdesc\[", code)
        values = re.findall(rf"HGMMA\.64x{head_dim}x16\.{kind} R\d+, R\d+, gdesc\S+tnspB", code)
        assert (len(scores), len(values)) == (2 * head_dim // 16, 2 * keys // 16)
        blocks = head_dim // 64
        # queries of two consumers; the last tile of keys and values, and those of the loop
        assert len(re.findall(r"UTMALDG\.4D", code)) == 6 * blocks
        assert len(re.findall(r"UTMALDG\.4D\.MULTICAST", code)) == (cluster - 1) * 4 * blocks
        assert ("UCGABAR" in code) == (cluster > 1)
        assert re.search(r"LDGSTS\S*\.128 ", code)
        assert "ARRIVES.LDGSTSBAR" in code
        for once in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
            assert code.count(once) == 1, once
        assert not re.search(r"\b(LDL|STL|HMMA)\b", code)
        assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < MOST_REGISTERS
        # four waits: the first scores, the loop's scores and values, the last values
        parts = re.split(r"WARPGROUP\.DEPBAR", code)
        assert len(parts) == 5
        # the loop exponentiates after the scores' wait, before the values'
        assert len(re.findall(r"MUFU\.EX2", parts[2])) == keys // 2 + 2
    for code in machine_code(source, "80").values():
        assert "HMMA" not in code and "BPT.TRAP" in code


# ---- on a GPU


def on_hopper() -> bool:
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return here and "cuda_impl" in implementations(ROOM)


on_a_hopper = pytest.mark.skipif(not on_hopper(), reason="needs an sm_90 GPU and a build for it")


@pytest.mark.gpu
@on_a_hopper
def test_each_instruction_on_a_gpu(tmp_path):
    """Products, copies and stores alone: where the kernel is wrong, this says what of it."""
    gpu.run_program(tmp_path, OPERANDS, TENSOR_MAP)


@pytest.mark.gpu
@on_a_hopper
@each_dtype
@each_way
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, head_dim, key_tile, cluster, dtype, impl, generator):
    length, lengths = CASES[case]
    inputs = [x.cuda() for x in draw(generator, lengths, length, 3, head_dim, dtype)]
    kv_len, scale = torch.tensor(lengths).cuda(), head_dim**-0.5
    way = {"key_tile": key_tile, "cluster": cluster}
    out, lse = impl.forward(*inputs, kv_len, scale, **way)
    assert_right(out, lse, inputs, lengths, scale)
    gpu.assert_same_bits_at_every_run(lambda: impl.forward(*inputs, kv_len, scale, **way))


@pytest.mark.gpu
@pytest.mark.whole_gpu
@on_a_hopper
def test_past_two_to_the_31_on_a_gpu():
    """Long samples of more than 2^31 elements in all: the same as their parts alone."""
    shape = gpu.size((3, 2**18, 24, 128), (3, 140, 1, 64))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert gpu.rehearsed or q.numel() > 2**31
    lengths = gpu.size([300, 0, 1000], [30, 0, 100])
    kv_len = torch.tensor(lengths, device="cuda")
    with use("cuda_impl", ROOM), torch.no_grad():
        whole = attention(q, k, v, kv_len=kv_len)
        for item, valid in ((0, lengths[0]), (2, lengths[2])):
            part = [x[item : item + 1, :valid].contiguous() for x in (q, k, v)]
            assert torch.equal(whole[item : item + 1, :valid], attention(*part))
            assert not whole[item, valid:].any()
