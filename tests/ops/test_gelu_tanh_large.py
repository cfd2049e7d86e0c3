"""Tensors so large that the C++ kernels write them past the caches."""

import pytest
import torch

from hunyuan_fast import ops
from hunyuan_fast.dispatch import implementations, use
from tests.kit.inputs import draw
from tests.kit.numerics import assert_equal

ROOM = "gelu_tanh"
pytestmark = pytest.mark.skipif(
    "cpu_impl" not in implementations(ROOM), reason="the native module is not built"
)
FEW = slice(211, 216)
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Rows that start where lines of the cache do, rows that do not, and long rows of odd length.
each_width = pytest.mark.parametrize("width", [8192, 8200, 12_321])


def gradient(function, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, dy)[0]


@each_type
@each_width
def test_large_tensors_hold_what_small_ones_do(dtype, width, generator):
    x, dy = (draw("normal", (2, 300, width), generator, dtype) for _ in range(2))
    with use("cpu_impl", ROOM):
        assert_equal(ops.gelu_tanh(x)[:, FEW], ops.gelu_tanh(x[:, FEW].clone()), name="y")
        dx = gradient(ops.gelu_tanh, x, dy)
        assert_equal(dx[:, FEW], gradient(ops.gelu_tanh, x[:, FEW], dy[:, FEW]), name="dx")


@each_type
@each_width
def test_behind_another_tensor(dtype, width, generator):
    """The part of the rows that is written past the caches starts anywhere."""
    left, x = (draw("normal", (1, 600, w), generator, dtype) for w in (60, width))
    with use("cpu_impl", ROOM):
        whole = ops.concat_gelu_tanh(left, x)
        few = ops.concat_gelu_tanh(left[:, FEW].clone(), x[:, FEW].clone())
    assert_equal(whole[:, FEW], few, name="concat")


@each_type
def test_columns_of_a_large_tensor(dtype, generator):
    """Rows whose distance would allow it and whose length does not."""
    x = draw("normal", (600, 8192), generator, dtype)[:, :8100]
    with use("cpu_impl", ROOM):
        assert_equal(ops.gelu_tanh(x)[FEW], ops.gelu_tanh(x[FEW].clone()), name="y")
