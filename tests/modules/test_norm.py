"""Root-mean-square norm against torch's."""

import pytest
import torch
from torch.nn import functional as F

from hunyuan_fast.modules.norm import RMSNorm


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_equals_torch(generator, offset):
    norm = RMSNorm(24)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=generator))
    x = (torch.randn(2, 5, 3, 24, generator=generator) + offset).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()

    ours, expected = norm(x), F.rms_norm(y, (24,), weight, 1e-6)
    torch.testing.assert_close(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)


def test_statistics_are_fp32_in_low_precision(generator):
    x = (300 * torch.randn(4, 128, generator=generator)).half()  # squares overflow float16
    expected = F.rms_norm(x.double(), (128,), None, 1e-6)
    error = (RMSNorm(128).half()(x).double() - expected).abs()
    assert (error <= 2**-11 * expected.abs() * 1.01 + 1e-7).all(), "one rounding, no more"


def test_result_is_rounded_before_the_weight(generator):
    norm = RMSNorm(16).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1 + torch.rand(16, generator=generator))
    x = torch.randn(50, 16, generator=generator).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), normed.bfloat16() * norm.weight)


def test_epsilon_guards_zero_rows():
    x = torch.zeros(2, 8, requires_grad=True)
    RMSNorm(8)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1000.0))
