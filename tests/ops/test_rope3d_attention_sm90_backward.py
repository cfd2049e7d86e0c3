"""The gradients of attention on Hopper: the real kernels on an emulated machine, machine code."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from tests.kit import hopper
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.inputs import with_layout
from tests.kit.native import ROOT, assert_no_spills, build, disassembler, machine_code, nvcc
from tests.kit.numerics import assert_as_good_as, assert_equal

DRIVER = ROOT / "tests/native/hopper_attention_backward.cpp"
SOURCES = sorted((ROOT / "csrc/rope3d_attention").glob("sm90_backward_*.cu"))


@pytest.fixture(scope="module")
def kernels():
    if hopper.compiler() is None:
        pytest.skip("no C++ compiler")
    return hopper.build(DRIVER)


def draw(generator, shape, dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def backward(
    kernels: hopper.Kernels,
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    scale: float,
    **machine: int,
) -> list[Tensor]:
    """dq, dk and dv by the kernels, whose workspace holds NaN before."""
    q, k, v, dout = inputs
    sizes = [*q.shape[:2], q.shape[2], q.shape[3]]
    size = torch.zeros(1, dtype=torch.int64)
    kernels.run("attention_backward_workspace", sizes, size)
    workspace = torch.full((int(size),), 255, dtype=torch.uint8)
    gradients = [torch.full_like(q, torch.nan, memory_format=torch.contiguous_format) for _ in "qkv"]
    rows = [q, k, v, out, dout, *gradients]
    step = 0 if lengths is None else lengths.stride(0) * lengths.element_size() // 4
    strides = [stride for x in rows for stride in (x.stride(0), x.stride(1), x.stride(2))]
    half = int(q.dtype == torch.float16)
    arguments = [*rows, lse, lengths, workspace, scale, [*sizes, half, step, *strides]]
    kernels.run("attention_backward", *arguments, **machine)
    return gradients


def given(inputs, lengths, scale):
    q, k, v, _ = inputs
    out, lse = FlashAttention().forward(q, k, v, lengths, scale)
    return out, lse


def judge(results, inputs, out, lse, lengths, scale, label=""):
    def plain(dtype):
        q, k, v, dout = (x.detach().to(dtype, copy=True) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(plain_attention(*leaves, lengths, scale)[0], leaves, dout)

    q, k, v, dout = inputs
    exact, same_dtype = plain(torch.float64), plain(q.dtype)
    golden = FlashAttention().backward(dout, out, lse, q, k, v, lengths, scale)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_as_good_as(results[i], exact[i], same_dtype[i], golden[i], name=name + label, factor=2.0, rms_factor=1.15)
