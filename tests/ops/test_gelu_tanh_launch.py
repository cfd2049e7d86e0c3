"""GELU on GPUs: launch choices, refusals, machine code; runs where there is one."""

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.kernels.gelu_tanh import config
from hunyuan_fast.ops import concat_gelu_tanh, gelu_tanh
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.test_gelu_tanh import (
    ROOM,
    assert_concat_right,
    assert_right,
    concat_inputs,
    inputs,
    run,
    run_concat,
)

MODULE = f"hunyuan_fast.kernels.{ROOM}.triton_impl"


@pytest.mark.parametrize("element_size", [2, 4])
def test_blocks_fit_their_rows(element_size):
    for width in (1, 31, 32, 33, 768, 3072, 12288, 2**31 + 8):
        choice = config.triton_block(width, element_size)
        assert choice.block & (choice.block - 1) == 0
        assert choice.block < max(2 * width, 33)
        per_thread = choice.block // (32 * choice.num_warps)
        assert 1 <= per_thread <= 2 * 16 // element_size
        if width >= 2048:
            assert per_thread * element_size == 32 and choice.num_warps == 4
    # no lane idles at the width of the model
    assert 12288 % config.triton_block(12288, element_size).block == 0


def triton_impl():
    pytest.importorskip("triton")
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(str(explain(ROOM, torch.zeros(1))["triton_impl"]))
    return implementations(ROOM)["triton_impl"]


def test_triton_refusals(monkeypatch):
    impl = triton_impl()
    x = torch.zeros(1, 2, 8)
    assert "x must be float32, bfloat16 or float16" in impl.supports(x.double())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "x must be on a CUDA device, it is on cpu" in impl.supports(x)


def test_cpu_refusals():
    pytest.importorskip("hunyuan_fast._C")
    impl = implementations(ROOM)["cpu_impl"]
    x = torch.zeros(1, 2, 8)
    assert impl.supports(x) is None
    assert "x must be on the CPU, it is on meta" in impl.supports(x.to("meta"))
    assert "x must be float32, bfloat16 or float16" in impl.supports(x.double())
    assert "at most 6 dimensions, it has 7" in impl.supports(x[None, None, None, None])


def test_the_native_functions_check_what_they_get():
    native = pytest.importorskip("hunyuan_fast._C")
    x = torch.zeros(2, 3, 8)
    for args, words in (
        ((x, x[..., :7], True, 1), r"y must have rows of 8, got the shape \(2, 3, 7\)"),
        ((x, x[:1], True, 1), r"y does not fit x: it has the shape \(1, 3, 8\)"),
        ((x, x.half(), True, 1), "y must be float32, got float16"),
        ((x.long(), x, True, 1), "x must be float32, float16 or bfloat16, got int64"),
        ((x[:0], x[:0], True, 1), "x must have elements"),
        ((x.mT.contiguous().mT, x, True, 1), "x must be contiguous in its last dimension"),
    ):
        with pytest.raises(ValueError, match=words):
            native.gelu_tanh_forward_cpu(*args)
    with pytest.raises(ValueError, match="y must have rows of 16"):
        native.gelu_tanh_concat_cpu(x, x, x, 1)
    with pytest.raises(ValueError, match=r"dy must have rows of 8"):
        native.gelu_tanh_backward_cpu(x[..., :4], x, x, 1)


@pytest.mark.parametrize("what", ["forward", "concat", "backward"])
def test_programs_do_not_depend_on_their_order(what, generator):
    impl = triton_impl()
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from tests.kit.interpreter import shuffled_programs

    left, x, dy = concat_inputs(2, 3, (40, 70), generator, torch.bfloat16)

    def result():
        if what == "backward":
            return impl.backward(dy[..., 40:], x)
        return impl.forward(x, left if what == "concat" else None)

    straight = result()
    for seed in range(3):
        with shuffled_programs(seed):
            assert torch.equal(result(), straight)


def specialisations() -> list[Specialisation]:
    """What the launchers ask for at the model's widths, and for one long row, on three GPUs."""
    cases = []
    for arch in (80, 90, 100):
        for dtype, size in (("*bf16", 2), ("*fp32", 4)):
            choice = config.triton_block(12288, size)
            common = {"constants": {"BLOCK": choice.block}, "num_warps": choice.num_warps}
            common |= {"module": MODULE, "arch": arch}
            x = {"x_ptr": dtype, "length": "i32", "stride_xb": "i64", "stride_xl": "i32"}
            for width in ("i32", "i64") if arch == 90 else ("i32",):
                cases.append(
                    Specialisation(
                        kernel="_forward_kernel",
                        signature={**x, "y_ptr": dtype, "width": width}
                        | {"stride_yb": "i64", "stride_yl": "i32"},
                        unaligned=("length",),
                        **common,
                    )
                )
                cases.append(
                    Specialisation(
                        kernel="_backward_kernel",
                        signature={**x, "dy_ptr": dtype, "dx_ptr": dtype, "width": width}
                        | {"stride_dyb": "i64", "stride_dyl": "i32"},
                        unaligned=("length",),
                        **common,
                    )
                )
            cases.append(
                Specialisation(
                    kernel="_concat_kernel",
                    signature={**x, "left_ptr": dtype, "y_ptr": dtype, "width": "i32"}
                    | {"left_width": "i32", "stride_leftb": "i64", "stride_leftl": "i32"},
                    unaligned=("length",),
                    **common,
                )
            )
    return cases


def test_triton_kernels_compiled_ahead_are_lean():
    pytest.importorskip("triton")
    for report in compile_ahead(specialisations()):
        # what leaves 10 blocks of 128 threads on a multiprocessor
        report.assert_lean(max_registers=48, min_access_bits=128)
        assert set(report.global_accesses) <= {128, 256}, report


GPU_IMPLEMENTATIONS = tuple(n for n in implementations(ROOM) if n in ("cuda_impl", "triton_impl"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    gpu.size([(1, 1, 64), (2, 77, 1023), (1, 333, 12288)], [(1, 1, 64), (2, 3, 1023)]),
    ids=str,
)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_on_a_gpu(name, shape, dtype, generator):
    x, dy = (t.cuda() for t in inputs(shape, generator, dtype))
    x = 3 * x
    actual = run(name, x, dy)
    assert_right(actual, x, dy)
    batch, length, width = shape
    args = [t.cuda() for t in concat_inputs(batch, length, (48, width), generator, dtype)]
    y, dleft, dx = run_concat(name, *args)
    assert_concat_right((y.cpu(), dleft.cpu(), dx.cpu()), *(t.cpu() for t in args))
    gpu.assert_same_bits_at_every_run(lambda: run(name, x, dy), gpu.FEW)


@pytest.mark.gpu
@pytest.mark.whole_gpu
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_past_two_to_the_31_on_a_gpu(name):
    """One long row, and the rows of a view of the single block's first linear layer."""
    length = gpu.rows_past_two_to_the_31(21504)
    packed = torch.randn(1, length, 21504, device="cuda", dtype=torch.bfloat16)
    x = packed[..., 9216:]
    with use(name, ROOM):
        y = concat_gelu_tanh(packed[..., :64], x)
        for rows in (slice(0, 4), slice(-4, None)):
            expected = concat_gelu_tanh(packed[:, rows, :64], x[:, rows])
            assert torch.equal(y[:, rows], expected)
        del y
        last = gelu_tanh(packed[:, -4:])
        gelu_tanh(packed, out=packed)
        assert torch.equal(packed[:, -4:], last)
