"""Norm and convolution in one: the bits of the two apart, and half of what they keep."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hunyuan_fast.ops import causal_conv3d, group_norm_silu, group_norm_silu_conv3d
from tests.kit.numerics import assert_equal

GROUPS = 3
SHAPES = {
    "several": ((2, 6, 3, 5, 4), (7, 6, 3, 3, 3)),
    "image": ((1, 6, 1, 3, 5), (2, 6, 3, 3, 3)),
    "pointwise": ((2, 6, 2, 1, 3), (5, 6, 1, 1, 1)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(shape: str, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """x, weight and bias of the norm, weight and bias of the convolution."""
    clip, taps = SHAPES[shape]
    sizes = clip, (6,), (6,), taps, taps[:1]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def together(x: Tensor, *others: Tensor | None) -> Tensor:
    return group_norm_silu_conv3d(x, GROUPS, *others, eps=1e-5)


def apart(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return causal_conv3d(group_norm_silu(x, GROUPS, gamma, beta, eps=1e-5), weight, bias)


def run(function, tensors: list[Tensor | None], needs: tuple[bool, ...]) -> list[Tensor | None]:
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]
    y = function(*leaves)
    if any(needs):
        y.sin().sum().backward()
    return [y.detach(), *(None if t is None else t.grad for t in leaves)]


def check(tensors: list[Tensor | None], needs: tuple[bool, ...] = (True,) * 5) -> None:
    pairs = zip(run(together, tensors, needs), run(apart, tensors, needs), strict=True)
    for actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_the_two(shape, dtype, generator):
    check(draw(shape, dtype, generator))


@pytest.mark.parametrize(
    "needs", [n for n in product((False, True), repeat=5) if sum(n) in (0, 1, 4)]
)
def test_gradients_of_some(needs, generator):
    check(draw("several", torch.float32, generator), needs)


def test_without_bias(generator):
    tensors = draw("several", torch.float32, generator)
    check([*tensors[:4], None], (True,) * 4 + (False,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, generator):
    """The map in the dtype of autocast, as within the VAE, and in another."""
    x, *others = draw("several", torch.float32, generator)
    with torch.autocast("cpu", torch.bfloat16):
        check([x.to(dtype), *others])
        assert together(x.to(dtype), *others).dtype == torch.bfloat16


def test_backward_keeps_the_map_and_not_its_norm(generator):
    tensors = [t.requires_grad_() for t in draw("several", torch.float32, generator)]
    own = {t.untyped_storage().data_ptr() for t in tensors}

    def kept(function) -> int:
        found: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(*tensors)
        assert y.requires_grad
        return sum(t.untyped_storage().nbytes() for t in found.values())

    statistics = 3 * 2 * GROUPS * 8
    assert kept(together) == statistics
    assert kept(apart) == statistics + tensors[0].numel() * 4


def test_opcheck_and_compile(generator):
    x, gamma, beta, weight, bias = tensors = draw("several", torch.float32, generator)
    for t in tensors:
        t.requires_grad_()
    operator = torch.ops.hunyuan_fast.group_norm_silu_conv3d.default
    opcheck(operator, (x, GROUPS, gamma, beta, 1e-5, weight, bias))
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    needs = (True,) * 5
    for actual, expected in zip(
        run(compiled, tensors, needs), run(together, tensors, needs), strict=True
    ):
        assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: torch.ones(2, 6, 3)}, ValueError, r"x must be \(B, C, T, H, W\)"),
        ({1: torch.ones(5)}, ValueError, r"norm_weight must be \(C,\) = \(6,\), got shape \(5,\)"),
        ({2: torch.ones(6, 1)}, ValueError, r"norm_bias must be \(C,\)"),
        ({3: torch.ones(7, 5, 3, 3, 3)}, ValueError, r"weight must be \(O, C, KT, KH, KW\)"),
        ({3: torch.ones(7, 6, 3, 3, 3).double()}, TypeError, "weight must have the dtype of x"),
        ({4: torch.ones(6)}, ValueError, r"bias must be \(O,\) = \(7,\)"),
    ],
)
def test_refusals(changes, error, message, generator):
    tensors = dict(enumerate(draw("several", torch.float32, generator)))
    with pytest.raises(error, match=message):
        together(*(tensors | changes).values())


def test_a_number_of_groups_that_does_not_divide(generator):
    x, *others = draw("several", torch.float32, generator)
    with pytest.raises(ValueError, match="num_groups must divide the channels of x, C = 6, got 4"):
        group_norm_silu_conv3d(x, 4, *others)
    with pytest.raises(ValueError, match="eps must be positive and finite, got 0"):
        group_norm_silu_conv3d(x, 3, *others, eps=0)
