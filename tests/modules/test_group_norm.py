"""Group norm and SiLU in one: exact statistics, one rounding, gradients."""

import pytest
import torch
import torch.nn.functional as F

from hunyuan_fast.modules import group_norm
from hunyuan_fast.modules.group_norm import GroupNormSiLU, group_norm_silu
from tests.kit.numerics import assert_rounded_once

SHAPES = [(2, 8, 3, 5, 7), (1, 12, 1, 1, 1), (3, 4, 2, 1, 9), (1, 8, 5, 16, 16)]


@pytest.fixture(autouse=True, params=[1 << 17, 64])
def block(request, monkeypatch):
    """The whole map in one block, and in many with a rest."""
    monkeypatch.setattr(group_norm, "_BLOCK", request.param)


def inputs(generator, shape, *, offset=0.5, dtype=torch.float32):
    x = torch.randn(shape, generator=generator) * 2 + offset
    weight = 1 + 0.3 * torch.randn(shape[1], generator=generator)
    bias = 0.5 * torch.randn(shape[1], generator=generator)
    return x.to(dtype), weight, bias


def plain(x, weight, bias):
    return F.silu(F.group_norm(x, 4, weight, bias, 1e-6))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_rounded_once(generator, poison, shape, dtype):
    x, weight, bias = inputs(generator, shape, dtype=dtype)
    exact = plain(x.double(), weight.double(), bias.double())
    actual = group_norm_silu(x, 4, weight, bias)
    assert actual.dtype == dtype
    assert_rounded_once(actual, exact, plain(x.float(), weight, bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(generator, poison, shape):
    x, weight, bias = (v.double().requires_grad_() for v in inputs(generator, shape))

    def run(*values):
        return group_norm_silu(values[0], 4, *values[1:])

    if x.numel() > x.shape[1]:
        assert torch.autograd.gradcheck(run, (x, weight, bias), fast_mode=True)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    actual = torch.autograd.grad((run(x, weight, bias) * upstream).sum(), (x, weight, bias))
    expected = torch.autograd.grad((plain(x, weight, bias) * upstream).sum(), (x, weight, bias))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_good_as_plain_torch(generator, dtype):
    x, weight, bias = inputs(generator, (2, 8, 3, 12, 12), dtype=dtype)
    upstream = torch.randn(x.shape, generator=generator).to(dtype)

    def gradients(run, *values):
        values = [v.detach().requires_grad_() for v in values]
        return torch.autograd.grad((run(*values) * upstream.to(values[0].dtype)).sum(), values)

    truth = gradients(plain, x.double(), weight.double(), bias.double())
    ours = gradients(lambda x, w, b: group_norm_silu(x, 4, w, b), x, weight, bias)
    theirs = gradients(plain, x, weight, bias)
    for name, exact, one, other in zip(("x", "weight", "bias"), truth, ours, theirs, strict=True):
        error, plain_error = ((v.double() - exact).norm() for v in (one, other))
        assert error <= 2 * plain_error + 1e-7 * exact.norm(), name


def test_a_large_mean_costs_no_digits(generator):
    """The variance is no difference of large sums."""
    x, weight, bias = inputs(generator, (1, 8, 4, 32, 32), offset=4000.0)
    exact = plain(x.double(), weight.double(), bias.double())
    actual = group_norm_silu(x, 4, weight, bias)
    # x itself is stored to 1e-4 of its deviation: applying the norm cannot be better than that
    torch.testing.assert_close(actual.double(), exact, atol=1e-3, rtol=1e-3)


def test_a_constant_map(generator):
    _, weight, bias = inputs(generator, (1, 8, 1, 1, 1))
    x = torch.full((1, 8, 2, 3, 3), 3.0)
    expected = F.silu(bias).view(1, -1, 1, 1, 1).expand_as(x)
    # the deviation is the square root of eps, so roundings of x count a thousandfold
    torch.testing.assert_close(group_norm_silu(x, 4, weight, bias), expected, atol=1e-3, rtol=0)


def test_statistics_span_time(generator):
    norm = GroupNormSiLU(4, 8)
    x = torch.randn(1, 8, 2, 4, 4, generator=generator)
    changed = x.clone()
    changed[:, :, 1] *= 3
    assert norm.eps == 1e-6
    assert (norm(x)[:, :, 0] - norm(changed)[:, :, 0]).abs().max() > 0.01


def test_only_the_input_is_kept_for_the_backward(generator):
    x, weight, bias = inputs(generator, (1, 8, 4, 16, 16))
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group_norm_silu(x, 4, weight, bias)
    assert sum(t.numel() for t in kept) <= x.numel() + 4 * x.shape[1]
