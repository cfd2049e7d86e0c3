"""Hopper's attention with norm and rotation of its queries: emulated, and its machine code."""

import re
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hunyuan_fast.kernels.qk_norm_rope import reference
from tests.kit import hopper
from tests.kit.native import ROOT, assert_no_spills, build, disassembler, machine_code, nvcc
from tests.kit.numerics import assert_equal
from tests.ops.qk_norm_rope_cases import Call, draw_call
from tests.ops.test_rope3d_attention_sm90 import (
    MOST_REGISTERS,
    Emulator,
    assert_right,
    each_dtype,
    emulated_by,
    impl,
    needs_compiler,
    on_a_hopper,
)

__all__ = ["impl"]  # a fixture
PLAIN_DRIVER = ROOT / "tests/native/hopper_attention.cpp"
DRIVER = ROOT / "tests/native/hopper_raw_attention.cpp"
SOURCES = sorted((ROOT / "csrc/rope3d_attention").glob("sm90_raw_*.cu"))

# video rows, text rows, lengths, streams: a consumer has 64 rows, a thread block 128.
CASES = {
    "one token": (1, 0, [1], 1),
    "text alone": (0, 70, [70, 33], 1),
    "video ends within a consumer's rows": (90, 57, [147, 0, 131], 2),
    "video ends with a consumer's rows": (64, 66, [129, 1], 2),
    "padding from the first rows on": (200, 80, [1, 280], 1),
    "many tiles": (333, 216, [549, 437], 2),
}


class RawEmulator(Emulator):
    """What ``_C`` has of the Hopper kernels, those that prepare their queries too."""

    def __init__(self, headers: Path = ROOT / "csrc") -> None:
        self._headers = headers
        self._raw = hopper.build(DRIVER, headers)
        self.seed, self.processors = 0, 3

    @cached_property
    def _kernels(self) -> hopper.Kernels:
        """The plain ones, which few tests want."""
        return hopper.build(PLAIN_DRIVER, self._headers)

    def rope3d_attention_forward_raw_hopper(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_qkv: Tensor | None,
        text_q_weight: Tensor | None,
        eps: float,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor | None,
        scale: float,
        out: Tensor,
        lse: Tensor,
        cluster: int,
        _: int,
    ) -> None:
        assert q_weight.dtype == torch.float32
        assert cos.stride() == sin.stride()
        step = 0 if kv_len is None else kv_len.stride(0) * kv_len.element_size() // 4
        numbers = [*k.shape, cluster, k.dtype == torch.float16, step]
        numbers += [qkv.shape[1], len(cos), cos.stride(0)]
        for x in (qkv, text_qkv):
            numbers += [0, 0] if x is None else x.stride()[:2]
        for x in (k, v, out):
            numbers += x.stride()[:3]
        tensors = (qkv, text_qkv, q_weight, text_q_weight, cos, sin, k, v, kv_len, out, lse)
        self._raw.run(
            "attention_raw",
            *(*tensors, float(scale), float(eps), numbers),
            seed=self.seed,
            processors=self.processors,
        )


@pytest.fixture
def emulated(impl, monkeypatch) -> RawEmulator:
    """In the place of the native functions, and of a device to call them on."""
    return emulated_by(RawEmulator(), impl, monkeypatch)


def draw(generator, case: str, *, head_dim: int, dtype, heads: int = 1) -> tuple[Call, list[int]]:
    """A call whose padding is NaN."""
    video, text, lengths, streams = CASES[case]
    sizes = {"batch": len(lengths), "video": video, "text": text, "heads": heads}
    call = draw_call(generator, **sizes, head_dim=head_dim, streams=streams, dtype=dtype)
    for item, valid in enumerate(lengths):
        call.qkv[item, valid:] = torch.nan
        if call.text:
            call.text[0][item, max(0, valid - video) :] = torch.nan
    return call, lengths


def attend(impl, call: Call, kv_len: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """``forward_raw`` behind keys and values as the reference makes them."""
    _, k, v = reference.forward(*call.arguments, with_q=False)
    text, text_weight = call.text[:2] if call.text else (None, None)
    raw = call.qkv, call.weights[0], *call.tables, text, text_weight, call.eps
    assert impl.supports_raw(call.qkv, call.tables[0], text) is None
    return impl.forward_raw(*raw, k, v, kv_len, k.shape[-1] ** -0.5, **options)


# ---- emulated


@needs_compiler
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_emulated(case, cluster, impl, emulated, generator):
    """Against attention in float64 over q, k and v of the reference."""
    head_dim = (64, 128)[(list(CASES).index(case) + cluster) % 2]
    dtype = (torch.bfloat16, torch.float16)[list(CASES).index(case) // 2 % 2]
    emulated.seed = 4 + cluster
    call, lengths = draw(generator, case, head_dim=head_dim, dtype=dtype, heads=2)
    out, lse = attend(impl, call, torch.tensor(lengths), cluster=cluster)
    heads = reference.forward(*call.arguments)
    assert_right(out, lse, list(heads), lengths, head_dim**-0.5)


@needs_compiler
@each_dtype
@pytest.mark.parametrize("streams", [1, 2])
def test_queries_are_those_of_qk_norm_rope(streams, dtype, impl, emulated, generator):
    """Bit for bit what attention makes of them."""
    shape = {"video": 70, "text": 60, "heads": 2, "head_dim": 128, "streams": streams}
    call = draw_call(generator, **shape, dtype=dtype, weight_dtype=torch.float32, eps=0.25)
    lengths = torch.tensor([130, 101])
    expected = impl.forward(*reference.forward(*call.arguments), lengths, 128**-0.5)
    for result, wanted in zip(attend(impl, call, lengths), expected, strict=True):
        differ = (result != wanted).double().mean()
        assert differ < 0.02, "an element of q may round the other way, no more"


@needs_compiler
@pytest.mark.parametrize("seed", [*hopper.EXTREMES, 4, 5])
@pytest.mark.parametrize("cluster", [1, 2])
def test_the_order_of_things_does_not_matter(seed, cluster, impl, emulated, generator):
    """Buffers go round: some blocks for all items, or one for each."""
    case = "many tiles"
    call, lengths = draw(generator, case, head_dim=64, dtype=torch.bfloat16)
    kv_len = torch.tensor(lengths)
    expected = attend(impl, call, kv_len, cluster=1)
    emulated.seed, emulated.processors = seed, 2 + 3 * (seed % 2)
    for result, wanted in zip(attend(impl, call, kv_len, cluster=cluster), expected, strict=True):
        assert_equal(result, wanted)


@needs_compiler
def test_strides_do_not_matter(impl, emulated, generator):
    """A projection beside other results, and tables of other strides."""
    call, _ = draw(generator, "padding from the first rows on", head_dim=64, dtype=torch.float16)
    expected = attend(impl, call, None)
    beside = torch.full((*call.qkv.shape[:2], call.qkv.shape[2] + 40), torch.nan).half()
    qkv = beside[..., 16 : 16 + call.qkv.shape[2]].copy_(call.qkv)
    wide = torch.full((len(call.tables[0]), 2, 64), torch.nan)
    for index, table in enumerate(call.tables):
        wide[:, index] = table
    tables = wide.unbind(1)
    moved = Call(**{**vars(call), "qkv": qkv, "tables": tables})
    for result, wanted in zip(attend(impl, moved, None), expected, strict=True):
        assert_equal(result, wanted)


@needs_compiler
def test_an_infinity_in_a_text_row_stays_in_its_head(impl, emulated, generator):
    """Text is not turned by an angle of zero, which would be NaN beside an infinity."""
    shape = {"batch": 1, "video": 40, "text": 30, "heads": 2, "head_dim": 64, "streams": 1}
    call = draw_call(generator, **shape, dtype=torch.bfloat16)
    call.qkv[0, 50, 3] = torch.inf
    out, _ = attend(impl, call, None)
    assert out[0, 50, 0].isnan().all()
    clean = torch.ones(70, dtype=torch.bool)
    clean[50] = False
    assert out[0, clean].isfinite().all()
    assert out[0, 50, 1].isfinite().all()


def test_refusals(impl):
    qkv, cos = torch.zeros(2, 5, 3 * 64, dtype=torch.bfloat16), torch.zeros(3, 64)
    assert impl.supports_raw(qkv, cos, qkv) is None
    wide = torch.zeros(2, 5, 200, dtype=torch.bfloat16)
    assert "rows of qkv" in impl.supports_raw(wide[..., 4:196], cos, None)
    assert "rows of text_qkv" in impl.supports_raw(qkv, cos, wide[..., 1:193])
    odd = torch.zeros(2, 5, 196, dtype=torch.bfloat16)[..., :192]
    assert "rows of qkv" in impl.supports_raw(odd, cos, None)
    assert "the tables" in impl.supports_raw(qkv, cos[:1].expand(2**26, 64), None)


# ---- machine code


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch):
    assert_no_spills(source, arch)


@pytest.mark.skipif(nvcc() is None or disassembler() is None, reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_machine_code_is_what_was_meant(source):
    """The products and copies of the plain kernel, but for queries."""
    assert not re.findall(r"C75\d\d", build(source, "90a").log), "the compiler gave something up"
    codes = machine_code(source, "90a")
    assert len(codes) == 4
    for name, code in codes.items():
        head_dim, cluster = map(int, re.search(r"ShapeILi(\d+)ELi176ELi(\d)ELb1", name).groups())
        kind = "F32.BF16" if source.stem.endswith("bf16") else "F32"
        scores = re.findall(rf"HGMMA\.64x176x16\.{kind} R\d+, gdesc\[", code)
        values = re.findall(rf"HGMMA\.64x{head_dim}x16\.{kind} R\d+, R\d+, gdesc\S+tnspB", code)
        assert (len(scores), len(values)) == (2 * head_dim // 16, 2 * 176 // 16)
        blocks = head_dim // 64
        # the last tile of keys and values, and those of the loop
        assert len(re.findall(r"UTMALDG\.4D", code)) == 4 * blocks
        assert len(re.findall(r"UTMALDG\.4D\.MULTICAST", code)) == (cluster - 1) * 4 * blocks
        assert "MUFU.RSQ" in code
        assert re.search(r"LDG\.E\.128\.CONSTANT", code)
        assert re.search(r"STS\.128", code)
        assert not re.search(r"\b(LDL|STL|HMMA)\b", code)
        assert max(map(int, re.findall(r"\bR(\d+)\b", code))) < MOST_REGISTERS


@pytest.mark.gpu
@on_a_hopper
@each_dtype
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, head_dim, cluster, dtype, impl, generator):
    call, lengths = draw(generator, case, head_dim=head_dim, dtype=dtype, heads=3)
    leaves = [t.cuda() for t in call.leaves]
    tables = tuple(table.cuda() for table in call.tables)
    moved = Call(**{**vars(call.with_leaves(leaves)), "tables": tables})
    out, lse = attend(impl, moved, torch.tensor(lengths).cuda(), cluster=cluster)
    heads = reference.forward(*call.arguments)
    assert_right(out, lse, list(heads), lengths, head_dim**-0.5)
