"""Frame-causal attention on GPUs: launch choices, refusals, machine code, order of programs."""

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations
from hunyuan_fast.kernels.frame_causal_attention import config, library_impl
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.frame_causal_attention_cases import ROOM, Call, draw_call, run

KERNELS = f"hunyuan_fast.kernels.{ROOM}.triton_kernels"
TILES = {
    "forward_kernel": config.forward_tile,
    "query_gradient_kernel": config.query_gradient_tile,
    "key_gradient_kernel": config.key_gradient_tile,
}
# What a multiprocessor lends a program, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SIZES = ("num_heads", "queries", "past", "tokens", "key_tokens")


@pytest.mark.parametrize("tokens", [1, 16, 17, 144, 14_400])
@pytest.mark.parametrize("head_dim", [1, 16, 96, 128, 256, 512])
@pytest.mark.parametrize("kernel", TILES)
def test_tiles_are_powers_of_two_that_hold_a_head(kernel, head_dim, tokens):
    tile = TILES[kernel](head_dim, tokens)
    for size in (tile.block, tile.values, tile.queries, tile.keys):
        assert size >= 16 and size & (size - 1) == 0
    assert head_dim <= tile.block < max(2 * head_dim, 17)
    within_a_frame = tile.keys if kernel == "key_gradient_kernel" else tile.queries
    assert within_a_frame < max(2 * tokens, 17), "no program idles for more than half"


def test_hopper_takes_larger_blocks_of_the_widest_heads():
    wide = config.forward_tile(512, 1024, hopper=True)
    assert (wide.queries, wide.keys, wide.values) == (128, 64, 256)
    for call in ((512, 127), (256, 1024), (64, 1024)):
        assert config.forward_tile(*call, hopper=True) == config.forward_tile(*call)


def reason(name: str, call: Call) -> str | None:
    return implementations(ROOM)[name].supports(*call.arguments)


def test_triton_refusals(generator, monkeypatch):
    pytest.importorskip("triton")
    call = draw_call(generator, dtype=torch.bfloat16)
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, *call.arguments)["triton_impl"])
    assert reason("triton_impl", call) is None
    assert "q must be bfloat16 or float16, it" in reason("triton_impl", draw_call(generator))
    assert "empty" in reason("triton_impl", call.map(lambda x: x[:0]))
    wide = draw_call(generator, head_dim=514, dtype=torch.bfloat16)
    assert "at most 512, it is 514" in reason("triton_impl", wide)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "must be on a CUDA device" in reason("triton_impl", call)


def test_library_refusals(generator):
    from torch._subclasses import FakeTensorMode

    call = draw_call(generator, dtype=torch.bfloat16)
    assert reason("library_impl", call) is None
    assert "got meta" in reason("library_impl", call.map(lambda x: x.to("meta")))
    assert "empty" in reason("library_impl", call.map(lambda x: x[:0]))

    def on_cuda(dtype: torch.dtype, head_dim: int) -> str | None:
        x = torch.empty(1, 8, 1, head_dim, dtype=dtype, device="cuda")
        return library_impl.supports(x, x, x, 4, 1.0)

    with FakeTensorMode():
        assert on_cuda(torch.bfloat16, 512) is None
        assert on_cuda(torch.float32, 64) is None
        assert "float32 and 16 bits" in on_cuda(torch.float64, 64)
        assert "steps of 8" in on_cuda(torch.float16, 60)


def test_programs_do_not_depend_on_their_order(generator):
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    call = draw_call(generator, tokens=19, past=1, head_dim=32, dtype=torch.bfloat16)
    straight = run("triton_impl", call)
    for seed in range(2):
        with shuffled_programs(seed):
            shuffled = run("triton_impl", call)
        for got, wanted in zip(shuffled, straight, strict=True):
            assert torch.equal(got, wanted)


def specialisation(kernel: str, dtype: str, head_dim: int, arch: int) -> Specialisation:
    """What the launcher asks for, with frames of many tokens."""
    tile = TILES[kernel](head_dim, 1024)
    if kernel == "forward_kernel":
        tile = config.forward_tile(head_dim, 1024, hopper=arch == 90)
    inputs = {
        "forward_kernel": ("q", "k", "v"),
        "query_gradient_kernel": ("dout", "out", "q", "k", "v"),
        "key_gradient_kernel": ("dout", "q", "k", "v"),
    }[kernel]
    results = {
        "forward_kernel": ("out",),
        "query_gradient_kernel": ("dq",),
        "key_gradient_kernel": ("dk", "dv"),
    }[kernel]
    signature = {f"{name}_ptr": dtype for name in (*inputs, *results)}
    constants = {"D": head_dim, "BLOCK_D": tile.block, "QUERIES": tile.queries, "KEYS": tile.keys}
    if kernel == "forward_kernel":
        constants["VALUES"] = tile.values
    else:
        signature["delta_ptr"] = "*fp32"
    signature |= {"lse_ptr": "*fp32", **dict.fromkeys(SIZES, "i32"), "scale": "fp32"}
    for name in inputs:
        letter = name[0]
        signature |= {f"stride_{letter}b": "i64", f"stride_{letter}l": "i32"}
        signature[f"stride_{letter}n"] = "i64"  # heads first: L D elements between them
    return Specialisation(
        module=KERNELS,
        kernel=kernel,
        signature=signature,
        constants=constants,
        unaligned=SIZES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        arch=arch,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_compiled_ahead_are_lean(arch):
    pytest.importorskip("triton")
    choices = [("*bf16", 512), ("*bf16", 64)]
    if arch == 90:
        choices += [("*fp16", 512), ("*bf16", 16), ("*bf16", 96), ("*bf16", 128), ("*bf16", 256)]
    wanted = [specialisation(kernel, *choice, arch) for kernel in TILES for choice in choices]
    for asked, report in zip(wanted, compile_ahead(wanted), strict=True):
        report.assert_lean(min_access_bits=128)
        assert report.shared_bytes <= SHARED[arch], asked
        assert report.tensor_core_instructions, asked


@pytest.mark.gpu
def test_a_long_clip_on_a_gpu():
    """129 frames of 720p, as the VAE has them: each frame of queries alone gives the same."""
    impl = implementations(ROOM)["triton_impl"]
    frames, tokens = gpu.size((33, 90 * 160), (3, 30))
    q, k, v = (
        torch.randn(1, frames * tokens, 1, 512, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    out, lse = impl.forward(q, k, v, tokens, 512**-0.5)
    for frame in (0, frames // 4, frames - 1):
        rows = slice(frame * tokens, (frame + 1) * tokens)
        seen = k[:, : rows.stop], v[:, : rows.stop]
        got = impl.forward(q[:, rows], *seen, tokens, 512**-0.5)
        assert torch.equal(got[0], out[:, rows])
        assert torch.equal(got[1], lse[:, :, rows])
