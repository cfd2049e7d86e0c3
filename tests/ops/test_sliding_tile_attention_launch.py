"""Sliding-tile attention on GPUs: launch choices, refusals, machine code, order of programs."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hunyuan_fast.dispatch import explain, implementations
from hunyuan_fast.kernels.sliding_tile_attention import config, library_impl
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.sliding_tile_attention_cases import ROOM, Call, draw_call, run

KERNELS = f"hunyuan_fast.kernels.{ROOM}.triton_kernels"
TILES = {
    "forward_kernel": config.forward_tile,
    "query_gradient_kernel": config.query_gradient_tile,
    "key_gradient_kernel": config.key_gradient_tile,
}
# What a multiprocessor lends a program, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SIZES = ("num_heads", "length", "T", "H", "W", "tile_t", "tile_h", "tile_w")
# Pointers of each kernel, and the letters of those that have strides.
POINTERS = {
    "forward_kernel": (("q", "k", "v", "out"), ("lse",), "qkvo"),
    "query_gradient_kernel": (("dout", "out", "q", "k", "v", "dq"), ("lse", "delta"), "doqkv"),
    "key_gradient_kernel": (("dout", "q", "k", "v", "dk", "dv"), ("lse", "delta"), "dqkv"),
}


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 384])
@pytest.mark.parametrize("head_dim", [1, 16, 96, 128, 256])
@pytest.mark.parametrize("kernel", TILES)
def test_blocks_are_powers_of_two_that_hold_a_head(kernel, head_dim, tokens, hopper):
    tile = TILES[kernel](head_dim, tokens, hopper)
    for size in (tile.block, tile.queries, tile.keys):
        assert size >= 16 and size & (size - 1) == 0
    assert head_dim <= tile.block < max(2 * head_dim, 17)
    within_a_tile = tile.keys if kernel == "key_gradient_kernel" else tile.queries
    assert within_a_tile < max(2 * tokens, 17), "no program idles for more than half"


def reason(name: str, call: Call) -> str | None:
    return implementations(ROOM)[name].supports(*call.arguments)


def test_triton_refusals(generator, monkeypatch):
    pytest.importorskip("triton")
    call = draw_call(generator, dtype=torch.bfloat16)
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, *call.arguments)["triton_impl"])
    impl = implementations(ROOM)["triton_impl"]
    assert reason("triton_impl", call) is None
    assert "q must be bfloat16 or float16, it" in reason("triton_impl", draw_call(generator))
    assert "empty" in reason("triton_impl", call.map(lambda x: x[:0]))
    wide = draw_call(generator, head_dim=258, dtype=torch.bfloat16)
    assert "at most 256, it is 258" in reason("triton_impl", wide)
    across = call.q.mT.contiguous().mT
    assert "out must be adjacent" in impl.supports(*call.arguments, across)
    long = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, 2**31, 1, 1)
    assert "L times the longer of H and W" in impl.supports(long, long, long, *call.arguments[3:])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "must be on a CUDA device" in reason("triton_impl", call)


def test_library_refusals(generator):
    call = draw_call(generator, dtype=torch.bfloat16)
    assert reason("library_impl", call) is None
    assert "empty" in reason("library_impl", call.map(lambda x: x[:0]))
    assert "adjacent" in reason("library_impl", call.map(lambda x: x.mT.contiguous().mT))
    with FakeTensorMode():
        x = torch.empty(1, 8, 1, 16, device="cuda")
        assert "got cuda" in library_impl.supports(x, x, x, *call.arguments[3:])


def test_division_by_a_product_is_exact():
    """As ``_divide`` of the kernels, for every divisor that a box has, where a quotient rises."""
    y = torch.arange(1, 4097)[:, None]
    factor = 0x7FFFFFFF // y + 1
    quotient = torch.cat((torch.arange(1, 200), torch.logspace(2.3, 9.3, 200, 10).long()))
    for offset in (-1, 0, 1):
        x = quotient * y + offset
        divided = (2 * x) * factor >> 32
        assert torch.where(x * y < 2**31, divided == x // y, True).all()
    assert int(((quotient * y) * y < 2**31).sum()) > 10**5


def test_programs_do_not_depend_on_their_order(generator):
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    call = draw_call(generator, grid=(2, 5, 5), tile=(2, 3, 3), dtype=torch.bfloat16)
    straight = run("triton_impl", call)
    with shuffled_programs(1):
        shuffled = run("triton_impl", call)
    for got, wanted in zip(shuffled, straight, strict=True):
        assert torch.equal(got, wanted)


def specialisation(kernel: str, dtype: str, head_dim: int, arch: int) -> Specialisation:
    """What the launcher asks for, with tiles of many tokens and heads side by side in memory."""
    tile = TILES[kernel](head_dim, 384, arch >= 90)
    small, sums, letters = POINTERS[kernel]
    signature = {f"{name}_ptr": dtype for name in small}
    signature |= {f"{name}_ptr": "*fp32" for name in sums}
    signature |= {"windows_ptr": "*i32", "kv_len_ptr": "*i32", "scale": "fp32"}
    signature |= dict.fromkeys(SIZES, "i32")
    for letter in letters:
        signature |= {f"stride_{letter}b": "i64", f"stride_{letter}l": "i32"}
        signature[f"stride_{letter}n"] = "i32"
    constants = {"D": head_dim, "BLOCK_D": tile.block, "QUERIES": tile.queries, "KEYS": tile.keys}
    return Specialisation(
        module=KERNELS,
        kernel=kernel,
        signature=signature,
        constants=constants | {"HAS_LENGTHS": True},
        unaligned=SIZES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        arch=arch,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_compiled_ahead_are_lean(arch):
    pytest.importorskip("triton")
    choices = [("*bf16", 128)]
    if arch == 90:
        choices += [("*fp16", 64), ("*bf16", 256)]
    wanted = [specialisation(kernel, *choice, arch) for kernel in TILES for choice in choices]
    for asked, report in zip(wanted, compile_ahead(wanted), strict=True):
        report.assert_lean(min_access_bits=128)
        assert report.shared_bytes <= SHARED[arch], asked
        assert report.tensor_core_instructions, asked
