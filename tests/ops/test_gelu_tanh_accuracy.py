"""How exact GELU is, value by value, and whether the tests would notice if it were not."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hunyuan_fast.kernels.gelu_tanh import reference
from tests.kit.numerics import assert_rounded_once
from tests.ops.test_gelu_tanh import QUICK, each_quick_implementation, plain, run

SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
# Below it 1 + exp(-t) is infinite in fp32, and y zero; the derivative is up to 300 times as large.
SMALLEST_Y, SMALLEST_SLOPE = 2.0**-124, 2.0**-116
SEEDS = range(20)


def exact(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dy/dx and the logit 2 u in float64, with no cancellation far below zero."""
    x = x.double()
    t = x * (SLOPE + SLOPE * CUBIC * x.square())
    slope = x * (SLOPE + 3 * SLOPE * CUBIC * x.square())
    s, rest = torch.sigmoid(t), torch.sigmoid(-t)
    return x * s, s + slope * s * rest, t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_quick_implementation
def test_every_number_of_16_bits(name, dtype):
    """All but a few on the brink are rounded to nearest, and those to the neighbour."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = x[x.isfinite() & (x.abs() < 1e3)]
    y, dx = run(name, x, torch.ones_like(x))
    truth, slope, _ = exact(x)
    for got, true in ((y, truth), (dx, slope)):
        nearest = true.to(dtype)
        other = got != nearest
        assert other.double().mean() < 2e-3
        ulp = torch.nextafter(nearest.abs(), torch.full_like(got, torch.inf)) - nearest.abs()
        assert ((got - nearest).abs() <= ulp.float() + SMALLEST_SLOPE).all()


def numbers(bits_apart: int) -> Tensor:
    """Every ``bits_apart``-th float from 2^-30 to 16, of both signs."""
    first, last = (torch.tensor(v).view(torch.int32).item() for v in (2.0**-30, 16.0))
    x = torch.arange(first, last, bits_apart, dtype=torch.int32).view(torch.float32)
    return torch.cat((x, -x))


@each_quick_implementation
def test_relative_error_of_single_precision(name):
    """Also where y is tiny: an error of 2^-24 in the logit t is one of t 2^-24 in exp(t)."""
    x = numbers(331)
    y, _ = run(name, x, torch.ones_like(x))
    truth, _, t = exact(x)
    error = (y.double() - truth).abs()
    # t takes four roundings, the exponential and the quotient three
    allowed = 2.0**-24 * (4 * t.clamp(max=0).abs() + 3) * truth.abs() + SMALLEST_Y
    assert (error <= allowed).all(), (error / allowed).max()


@each_quick_implementation
def test_error_of_the_derivative_in_single_precision(name):
    x = numbers(331)
    _, dx = run(name, x, torch.ones_like(x))
    _, truth, t = exact(x)
    error = (dx.double() - truth).abs()
    assert error.max() <= 3 * 2.0**-23
    # beyond the zero of the derivative nothing cancels any more
    far = x < -2
    allowed = 2.0**-24 * (4 * t.abs() + 8) * truth.abs() + SMALLEST_SLOPE
    assert (error <= allowed)[far].all(), (error / allowed)[far].max()
    assert (dx[x <= -12] == 0).all() and (dx[x >= 12] == 1).all()


@each_quick_implementation
def test_more_exact_than_torch_far_below_zero(name):
    """1 + tanh(u) has no digits left where x sigmoid(2 u) has all but a few."""
    x = torch.linspace(-5, -3, 10_001)
    y, _ = run(name, x, torch.ones_like(x))
    truth, _, _ = exact(x)
    worst = ((y.double() - truth) / truth).abs().max()
    assert worst < 1e-5
    torch_error = torch.nn.functional.gelu(x, approximate="tanh").double() - truth
    assert (torch_error / truth).abs().max() > 100 * worst


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    pytest.importorskip("hunyuan_fast._C")
    names = ("test_gelu_tanh.py", "test_gelu_tanh_large.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in names)]
    wanted = "16_bits or single_precision or every_width or the_ends or layouts"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        + ["-k", f"(cpu_impl and ({wanted})) or large"],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to ``dtype`` by dropping bits: the 16 of bf16, and one of fp32 itself."""
    mask = -65536 if dtype == torch.bfloat16 else -2
    return (x.contiguous().view(torch.int32) & mask).view(torch.float32).to(dtype)


def _spoil(index: object, change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def write(y: Tensor) -> Tensor:
        y[index] = change(y)
        return y

    return write


@dataclass(frozen=True, kw_only=True)
class Emulated:
    """The kernels in plain torch, every step replaceable by a wrong one."""

    read: Callable[[Tensor], Tensor] = lambda x: x
    cubic: float = CUBIC
    slope: float = SLOPE
    exp: Callable[[Tensor], Tensor] = torch.exp
    inner: float = 3.0
    complement: Callable[[Tensor], Tensor] = lambda logit: torch.sigmoid(-logit)
    round: Callable[[Tensor, torch.dtype], Tensor] = _round
    write: Callable[[Tensor], Tensor] = lambda y: y
    write_gradient: Callable[[Tensor], Tensor] = lambda dx: dx

    def __call__(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.read(x).float()
        bounded = wide.clamp(-10, 10)
        logit = bounded * (self.slope + self.slope * self.cubic * bounded.square())
        s = 1 / (1 + self.exp(-logit))
        steep = bounded * (self.slope + self.inner * self.slope * self.cubic * bounded.square())
        dx = dy.float() * (s + steep * s * self.complement(logit))
        return (
            self.write(self.round(wide * s, x.dtype)),
            self.write_gradient(self.round(dx, x.dtype)),
        )


FAULTS = {
    "constant 0.0447": Emulated(cubic=0.0447),
    "sqrt(2 / pi) rounded to bf16": Emulated(slope=2 * 0.796875),
    "logit u instead of 2 u": Emulated(slope=SLOPE / 2),
    "exp off by 1e-5": Emulated(exp=lambda x: torch.exp(x) * (1 + 1e-5)),
    "exp of too few terms": Emulated(exp=lambda x: torch.exp2((x * 1.442695).round() * 1.0)),
    "exp in bf16": Emulated(exp=lambda x: torch.exp(x).bfloat16().float()),
    "x read as bf16": Emulated(read=lambda x: x.bfloat16()),
    "cut off instead of rounded": Emulated(round=_truncate),
    "rounded twice": Emulated(round=lambda x, dtype: (x.half() if x.dim() else x).to(dtype)),
    "last element not written": Emulated(write=_spoil((..., -1), lambda y: 0)),
    "one element of another": Emulated(write=_spoil((1, 77), lambda y: y[1, 78])),
    "last row of the one before": Emulated(write=_spoil(-1, lambda y: y[-2])),
    "no activation": Emulated(exp=torch.zeros_like),
    "derivative without the 3": Emulated(inner=1.0),
    "derivative of s left out": Emulated(complement=torch.zeros_like),
    "derivative by s alone": Emulated(complement=torch.sigmoid),
    "complement as a difference": Emulated(complement=lambda logit: 1 - torch.sigmoid(logit)),
    "last gradient not written": Emulated(write_gradient=_spoil((..., -1), lambda dx: 0)),
}
RIGHT = {
    "itself": Emulated(),
    "exp2": Emulated(exp=lambda x: torch.exp2(x * math.log2(math.e))),
    "reference": lambda x, dy: (reference.forward(x), reference.backward(dy, x)),
    **{name: lambda x, dy, name=name: run(name, x, dy) for name in QUICK},
}


@cache
def case(dtype: torch.dtype, spread: float, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(3, 3072, generator=generator) for _ in range(2))
    x, dy = (spread * x).to(dtype), dy.to(dtype)
    return x, dy, plain(x, dy, torch.float64), plain(x, dy, torch.float32)


def judge(kernel: Callable, seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for spread in (1e-3, 1.0, 3.0):
            x, dy, truth, single = case(dtype, spread, seed)
            for got, true, rounded in zip(kernel(x, dy), truth, single, strict=True):
                assert_rounded_once(got, true, rounded)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault):
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            judge(FAULTS[fault], seed)
            pytest.fail(f"nothing noticed: {fault}", pytrace=False)


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_raise_no_alarm(kernel):
    for seed in SEEDS:
        judge(RIGHT[kernel], seed)
