"""Attention in Triton: launch choices, refusals, descriptors, machine code, order of programs."""

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations
from hunyuan_fast.kernels.rope3d_attention import config
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.kit.inputs import with_layout
from tests.kit.numerics import assert_equal
from tests.ops.rope3d_attention_cases import ROOM, assert_close, draw_inputs, run

ROOM_MODULE = f"hunyuan_fast.kernels.{ROOM}"
TILES = {
    "forward_kernel": config.forward_tile,
    "query_gradient_kernel": config.query_gradient_tile,
    "key_gradient_kernel": config.key_gradient_tile,
}
READ = {
    "forward_kernel": ("q", "k", "v"),
    "query_gradient_kernel": ("dout", "out", "q", "k", "v"),
    "key_gradient_kernel": ("dout", "q", "k", "v"),
}
WRITTEN = {
    "forward_kernel": ("out",),
    "query_gradient_kernel": ("dq",),
    "key_gradient_kernel": ("dk", "dv"),
}
# What a multiprocessor lends a program, in bytes: 99 KB on the small GPUs of each generation.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture
def triton_impl():
    """The module, where its kernels run on the CPU."""
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    return implementations(ROOM)["triton_impl"]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [1, 16, 80, 96, 128, 256])
@pytest.mark.parametrize("kernel", TILES)
def test_tiles_are_powers_of_two_that_hold_a_head(kernel, head_dim, arch, aligned):
    tile = TILES[kernel](head_dim, arch, aligned)
    for size in (tile.block, tile.queries, tile.keys):
        assert size >= 16 and size & (size - 1) == 0
    assert head_dim <= tile.block < max(2 * head_dim, 17)
    assert not tile.descriptors or (aligned and arch in (90, 100))


def test_triton_refusals(triton_impl, generator, monkeypatch):
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)

    def reason(x: torch.Tensor, scale: float = 1.0) -> str | None:
        return triton_impl.supports(x, x, x, None, scale)

    assert reason(q) is None
    assert "must be bfloat16 or float16, it is torch.float32" in reason(q.float())
    assert "must be bfloat16 or float16, it is torch.float64" in reason(q.double())
    assert "at most 256, it is 257" in reason(q.new_zeros(1, 2, 1, 257))
    assert "empty" in reason(q[:0])
    assert "negative, it is -1.0" in reason(q, -1.0)
    assert "no committed result" in explain(ROOM, q, q, q, None, 1.0)["triton_impl"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "must be on a CUDA device" in reason(q)


@pytest.mark.parametrize(
    ("arch", "head_dim"), [(90, 64), (90, 80), (90, 128), (90, 256), (100, 128)]
)
def test_descriptors_and_products_ahead_change_no_more_than_the_order(
    triton_impl, arch, head_dim, generator, monkeypatch
):
    inputs = draw_inputs((3, 290, 1, head_dim), generator, torch.bfloat16)
    lengths = [290, 0, 256]
    for x in inputs:
        x[2, 256:] = torch.nan
    expected = run("triton_impl", inputs, lengths, head_dim**-0.5)
    monkeypatch.setattr(triton_impl, "_arch", lambda q: arch)
    results = run("triton_impl", inputs, lengths, head_dim**-0.5)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted)


@pytest.mark.parametrize("arch", [90, 100])
def test_descriptors_of_queries_of_their_own(triton_impl, arch, generator, monkeypatch):
    """Each tensor's has the length of its own."""
    q, *_, dout = draw_inputs((3, 140, 1, 64), generator, torch.bfloat16)
    k, v, *_ = draw_inputs((3, 290, 1, 64), generator, torch.bfloat16)
    queries, lengths = [140, 128, 5], [256, 0, 290]
    for item in range(3):
        for x, numbers in ((q, queries), (dout, queries), (k, lengths), (v, lengths)):
            x[item, numbers[item] :] = torch.nan
    expected = run("triton_impl", [q, k, v, dout], lengths, 0.125, queries)
    monkeypatch.setattr(triton_impl, "_arch", lambda q: arch)
    results = run("triton_impl", [q, k, v, dout], lengths, 0.125, queries)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted)


def test_rows_that_no_descriptor_can_name_are_loaded_otherwise(triton_impl, generator, monkeypatch):
    inputs = draw_inputs((2, 70, 2, 16), generator, torch.bfloat16)
    expected = run("triton_impl", inputs, [70, 9], 0.25)
    assert triton_impl._aligned(*inputs)
    monkeypatch.setattr(triton_impl, "_arch", lambda q: 90)
    for layout in ("sliced", "offset_by_one"):
        laid_out = [with_layout(x, layout) for x in inputs]
        assert not triton_impl._aligned(*laid_out)
        results = run("triton_impl", laid_out, [70, 9], 0.25)
        for result, wanted in zip(results, expected, strict=True):
            assert_close(result, wanted)
    assert not triton_impl._aligned(torch.zeros(1, 1, 2, 16).expand(1, 4, 2, 16))


def test_programs_do_not_depend_on_their_order(triton_impl, generator):
    from tests.kit.interpreter import shuffled_programs

    inputs = draw_inputs((2, 140, 2, 16), generator, torch.bfloat16)
    straight = run("triton_impl", inputs, [140, 33], 0.25)
    for seed in range(2):
        with shuffled_programs(seed):
            shuffled = run("triton_impl", inputs, [140, 33], 0.25)
        for got, wanted in zip(shuffled, straight, strict=True):
            assert_equal(got, wanted)


def specialisation(
    kernel: str,
    arch: int,
    head_dim: int,
    dtype: str = "*bf16",
    aligned: bool = True,
    own: bool = False,
) -> Specialisation:
    """What the launcher asks for, with lengths of samples and heads side by side.

    own: with queries of their own
    """
    tile = TILES[kernel](head_dim, arch, aligned)
    signature = {f"{name}_ptr": dtype for name in (*READ[kernel], *WRITTEN[kernel])}
    signature |= {"kv_len_ptr": "*i32", "lse_ptr": "*fp32"}
    signature |= {"num_heads": "i32", "length": "i32", "key_length": "i32", "scale": "fp32"}
    constants = {"D": head_dim, "BLOCK_D": tile.block, "QUERIES": tile.queries, "KEYS": tile.keys}
    constants["TMA"] = tile.descriptors
    if own:
        signature["q_len_ptr"] = "*i32"
    else:
        constants["q_len_ptr"] = None
    strided = READ[kernel]
    if kernel == "forward_kernel":
        constants["AHEAD"] = tile.ahead
        strided = (*strided, "out")
    else:
        signature["delta_ptr"] = "*fp32"
    for letter in (name[0] for name in strided):
        signature |= dict.fromkeys((f"stride_{letter}{axis}" for axis in "bln"), "i32")
    return Specialisation(
        module=f"{ROOM_MODULE}.triton_{'kernels' if kernel == 'forward_kernel' else 'backward'}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        unaligned=("num_heads", "length", "key_length"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        arch=arch,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_compiled_ahead_are_lean(arch):
    """The matrix instructions are those of the architecture, and Hopper's wait for registers."""
    pytest.importorskip("triton")
    choices = [{"head_dim": 128}, {"head_dim": 256}, {"head_dim": 128, "own": True}]
    if arch == 90:
        choices += [{"head_dim": 64, "dtype": "*fp16"}, {"head_dim": 128, "aligned": False}]
    wanted = [specialisation(kernel, arch, **choice) for kernel in TILES for choice in choices]
    expected = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
    for asked, report in zip(wanted, compile_ahead(wanted), strict=True):
        report.assert_lean(min_access_bits=128)
        assert report.shared_bytes <= SHARED[arch], asked
        small = asked.kernel == "key_gradient_kernel" and asked.constants["D"] > 128
        assert report.tensor_core_instructions.get("HMMA" if small else expected), asked


@pytest.mark.gpu
@pytest.mark.parametrize("length", gpu.size([4608, 33_024], [200]))
def test_long_samples_on_a_gpu(length):
    """Rows of a long sample are what they are alone, and the same bits at every run."""
    impl = implementations(ROOM)["triton_impl"]
    q, k, v, dout = (
        torch.randn(2, length, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    kv_len = torch.tensor([length - 77, 130], device="cuda")
    out, lse = impl.forward(q, k, v, kv_len, 128**-0.5)
    gradients = impl.backward(dout, out, lse, q, k, v, kv_len, 128**-0.5)
    alone = [x[1:, :130] for x in (q, k, v)]
    assert torch.equal(impl.forward(*alone, None, 128**-0.5)[0], out[1:, :130])
    for _ in range(gpu.size(gpu.FEW, 1)):
        assert torch.equal(impl.forward(q, k, v, kv_len, 128**-0.5)[0], out)
        again = impl.backward(dout, out, lse, q, k, v, kv_len, 128**-0.5)
        assert all(map(torch.equal, again, gradients))
