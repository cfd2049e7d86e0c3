"""A test of the tests: wrong kernels must be caught on every seed, right ones on none."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kit import native
from tests.kit.aot import Specialisation, compile_ahead
from tests.kit.emulation import FlashAttention, LayerNormModulate, plain_attention
from tests.kit.faults import ATTENTION, ATTENTION_BACKWARD, LAYER_NORM
from tests.kit.inputs import FAMILIES, draw
from tests.kit.numerics import (
    assert_as_good_as,
    assert_equal,
    assert_rounded_once,
    assert_same_codes,
)

triton = pytest.importorskip("triton")

SEEDS = range(20)
LENGTHS = [190, 130]
HEAD_DIM = 80  # its scale is no power of two, so folding it into bf16 costs digits
SCALE = HEAD_DIM**-0.5
# How sharply the softmax selects: scores of ordinary size, large, and nearly equal.
SHARPNESS = {"ordinary": 1.0, "sharp": 4.0, "flat": 0.1}
RESOURCE_FAULTS = ("double precision", "registers spilled", "narrow accesses")

launches_on_cpu = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton reaches tensors on the CPU through its interpreter only (TRITON_INTERPRET=1)",
)


def caught(check, *args) -> bool:
    try:
        check(*args)
    except AssertionError:
        return True
    return False


@cache
def layer_norm_case(family: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = draw(family, (2, 6, 3072), generator, torch.bfloat16)
    shift, scale = (0.3 * draw("normal", (2, 3072), generator).bfloat16() for _ in range(2))

    def formula(dtype: torch.dtype) -> Tensor:
        normed = torch.nn.functional.layer_norm(x.to(dtype), (3072,), eps=1e-6)
        return normed * (1 + scale.to(dtype)[:, None]) + shift.to(dtype)[:, None]

    exact, single = formula(torch.float64), formula(torch.float32)
    return {"inputs": (x, shift, scale), "exact": exact, "single": single}


def judge_layer_norm(kernel: LayerNormModulate, family: str, seed: int) -> None:
    case = layer_norm_case(family, seed)
    assert_rounded_once(kernel(*case["inputs"]), case["exact"], case["single"], name=family)


@pytest.mark.parametrize("fault", LAYER_NORM)
def test_layer_norm_faults_are_caught(fault):
    missed = [
        seed
        for seed in SEEDS
        if not any(caught(judge_layer_norm, LAYER_NORM[fault], each, seed) for each in FAMILIES)
    ]
    assert not missed


def test_a_right_layer_norm_raises_no_alarm():
    in_parts = LayerNormModulate(
        mean=lambda x: sum(part.sum(-1, keepdim=True) for part in x.split(128, -1)) / x.shape[-1],
        rsqrt=lambda x: 1 / torch.sqrt(x),
    )
    for seed in SEEDS:
        for family in FAMILIES:
            judge_layer_norm(LayerNormModulate(), family, seed)
            judge_layer_norm(in_parts, family, seed)


@cache
def attention_case(kind: str, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (draw("normal", (2, 197, 2, HEAD_DIM), generator) for _ in range(4))
    q, k, v, dout = (x.bfloat16() for x in (q * SHARPNESS[kind], k, v, dout))
    for item, length in enumerate(LENGTHS):
        k[item, length:], v[item, length:] = 3, 50  # a leak of padding must be loud
        dout[item, length:] = 7
    case = {"inputs": (q, k, v), "dout": dout}
    for name, dtype in (("exact", torch.float64), ("single", torch.float32), ("plain", q.dtype)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out, lse = plain_attention(*leaves, LENGTHS, SCALE)
        gradients = torch.autograd.grad(out, leaves, dout.to(dtype))
        case[name] = {"out": out.detach(), "lse": lse.detach(), "gradients": gradients}
    right = FlashAttention()
    case["out"], case["lse"] = right.forward(q, k, v, LENGTHS, SCALE)
    case["gradients"] = right.backward(dout, case["out"], case["lse"], q, k, v, LENGTHS, SCALE)
    return case


def judge_attention(kernel: FlashAttention, kind: str, seed: int) -> None:
    case = attention_case(kind, seed)
    out, lse = kernel.forward(*case["inputs"], LENGTHS, SCALE)
    assert_as_good_as(out, case["exact"]["out"], case["plain"]["out"], case["out"], name="out")
    assert_as_good_as(lse, case["exact"]["lse"], case["single"]["lse"], name="log-sum-exp")


def judge_attention_backward(kernel: FlashAttention, kind: str, seed: int) -> None:
    case = attention_case(kind, seed)
    gradients = kernel.backward(
        case["dout"], case["out"], case["lse"], *case["inputs"], LENGTHS, SCALE
    )
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_as_good_as(
            gradients[i],
            case["exact"]["gradients"][i],
            case["plain"]["gradients"][i],
            case["gradients"][i],
            name=name,
        )


@pytest.mark.parametrize("fault", ATTENTION)
def test_attention_faults_are_caught(fault):
    missed = [
        seed
        for seed in SEEDS
        if not any(caught(judge_attention, ATTENTION[fault], kind, seed) for kind in SHARPNESS)
    ]
    assert not missed


@pytest.mark.parametrize("fault", ATTENTION_BACKWARD)
def test_attention_backward_faults_are_caught(fault):
    kernel = ATTENTION_BACKWARD[fault]
    missed = [
        seed
        for seed in SEEDS
        if not any(caught(judge_attention_backward, kernel, kind, seed) for kind in SHARPNESS)
    ]
    assert not missed


@pytest.mark.parametrize(
    "right",
    [
        FlashAttention(),
        FlashAttention(block=32),
        FlashAttention(block=128),
        FlashAttention(exp=lambda x: torch.exp2(x * 1.4426950408889634)),
        FlashAttention(round_probabilities=lambda p, _: p),
    ],
    ids=["itself", "tiles of 32", "tiles of 128", "exp2", "nothing rounded"],
)
def test_a_right_attention_raises_no_alarm(right):
    for seed in SEEDS:
        for kind in SHARPNESS:
            judge_attention(right, kind, seed)
            judge_attention_backward(right, kind, seed)


@launches_on_cpu
def test_memory_and_order_faults_are_caught(interpreter):
    from tests.kit.faulty_kernels import INSPECTIONS

    for seed in range(5):
        for fault, inspect in INSPECTIONS.items():
            generator = torch.Generator().manual_seed(seed)
            with pytest.raises(AssertionError):
                inspect(fault, generator)
                pytest.fail(f"nothing noticed: {fault}", pytrace=False)


@launches_on_cpu
def test_a_right_kernel_passes_the_memory_inspections(interpreter):
    from tests.kit.faulty_kernels import INSPECTIONS

    for seed in SEEDS:
        for inspect in set(INSPECTIONS.values()):
            inspect(None, torch.Generator().manual_seed(seed))


def test_resource_faults_are_caught():
    """Spills, double precision and narrow accesses show in the machine code."""
    signature = {
        "x_ptr": "*bf16",
        "out_ptr": "*bf16",
        "mean_ptr": "*fp32",
        "stride_x": "i32",
        "stride_out": "i32",
        "width": "i32",
    }

    def specialise(fault: str | None, arch: int) -> Specialisation:
        return Specialisation(
            module="tests.kit.faulty_kernels",
            kernel="centre_rows_kernel",
            signature=signature,
            constants={"FAULT": fault, "BLOCK": 4096},
            num_warps=1 if fault == "registers spilled" else 8,
            maxnreg=32 if fault == "registers spilled" else None,
            unaligned=tuple(signature) if fault == "narrow accesses" else (),
            arch=arch,
        )

    wanted = [specialise(fault, 90) for fault in RESOURCE_FAULTS]
    wanted += [specialise(None, arch) for arch in (80, 90, 100)]
    reports = compile_ahead(wanted)
    for fault, report in zip(RESOURCE_FAULTS, reports, strict=False):
        with pytest.raises(AssertionError):
            report.assert_lean(min_access_bits=128)
            pytest.fail(f"nothing noticed: {fault}", pytrace=False)
    for report in reports[len(RESOURCE_FAULTS) :]:
        report.assert_lean(max_registers=64, min_access_bits=128)


@pytest.mark.skipif(native.nvcc() is None, reason="needs nvcc")
def test_a_spilling_cuda_kernel_is_caught(tmp_path: Path):
    body = """__global__ void __launch_bounds__(1024, 2) sort(float* x) {{
        float values[{count}];
        for (int i = 0; i < {count}; ++i) values[i] = x[i * 1024 + threadIdx.x];
        #pragma unroll
        for (int i = 0; i < {count}; ++i)
            for (int j = i; j < {count}; ++j)
                values[j] = fmaf(values[i], values[{count} - 1 - j], values[j]);
        for (int i = 0; i < {count}; ++i) x[i * 1024 + threadIdx.x] = values[i];
    }}"""
    lean, spilling = tmp_path / "lean.cu", tmp_path / "spilling.cu"
    lean.write_text(body.format(count=4))
    spilling.write_text(body.format(count=64))
    native.assert_no_spills(lean, "90a")
    with pytest.raises(AssertionError, match="spilled"):
        native.assert_no_spills(spilling, "90a")
    (tmp_path / "broken.cu").write_text("__global__ void broken(")
    with pytest.raises(RuntimeError, match="does not compile"):
        native.compile_cuda(tmp_path / "broken.cu", "80")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_codes_may_differ_by_ties_only(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in SEEDS:
        values = 30 * torch.randn(4096, generator=generator).clamp(-4, 4)
        codes = values.round().to(dtype) if dtype == torch.int8 else values.to(dtype)
        assert_same_codes(codes, values)
        assert_same_codes(codes, values * (1 + 1e-7))  # the scale in another order of operations
        wrong = codes.clone()
        wrong[17] = 96 if values[17] < 0 else -96
        with pytest.raises(AssertionError, match="1 of 4096 codes"):
            assert_same_codes(wrong, values)
        cut = values.trunc().to(dtype) if dtype == torch.int8 else (values * 0.97).to(dtype)
        with pytest.raises(AssertionError, match="codes differ"):
            assert_same_codes(cut, values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_in_the_same_places(bad):
    """A rule that skips NaN in the truth, or in the result, lets a kernel that spreads it pass."""
    finite = torch.randn(4, 8, dtype=torch.float64)
    spoiled = finite.clone()
    spoiled[2, 3] = bad
    for actual, exact in ((spoiled, finite), (finite, spoiled)):
        with pytest.raises(AssertionError, match=r"first difference is at \(2, 3\)"):
            assert_rounded_once(actual.float(), exact, exact.float())
        with pytest.raises(AssertionError, match=r"first difference is at \(2, 3\)"):
            assert_as_good_as(actual.float(), exact, exact.float())
        with pytest.raises(AssertionError):
            assert_equal(actual, exact)
    assert_as_good_as(spoiled.float(), spoiled, spoiled.float())
    assert_rounded_once(spoiled.float(), spoiled, spoiled.float())


def test_a_failure_names_the_worst_place():
    exact = torch.ones(4, 8, dtype=torch.float64)
    actual = exact.float()
    actual[1, 2], actual[3, 7] = 1.25, 1.5
    with pytest.raises(AssertionError, match=r"y: 2 of 32 .* Worst at \(3, 7\): got 1.5, exact 1"):
        assert_as_good_as(actual, exact, exact.float(), name="y")
