"""Tensors so large that the C++ kernels write them past the caches."""

from dataclasses import replace

import pytest
import torch

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import group_norm_silu, group_norm_stats
from tests.kit.numerics import assert_equal
from tests.ops.group_norm_silu_cases import ROOM, apply, draw_call, plain, run

pytestmark = pytest.mark.skipif(
    "cpu_impl" not in implementations(ROOM), reason="the native module is not built"
)
# 8 MiB and more of y; samples of the second shape do not start where lines of the cache do.
SHAPES = {"aligned": (1, 64, 17, 64, 64), "awkward": (3, 33, 9, 71, 79)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_large_tensors_hold_what_small_ones_do(shape, dtype, generator):
    call = draw_call(generator, SHAPES[shape], 1, dtype=dtype)
    few = call.x[:, :, 3:5].clone()
    with use("cpu_impl", ROOM), torch.no_grad():
        stats = group_norm_stats(call.x, 1)
        expected = group_norm_silu(few, 1, call.weight, call.bias, stats=stats)
        assert_equal(apply(call)[:, :, 3:5], expected, name="y")


@pytest.mark.parametrize("shape", SHAPES)
def test_large_gradients_are_right(shape, generator):
    call = draw_call(generator, SHAPES[shape], 1)
    _, dx, dweight, dbias = run("cpu_impl", call)
    exact = plain(replace(call, silu=True), torch.float64)
    torch.testing.assert_close(dx.double(), exact[1], rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(dweight.double(), exact[2], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(dbias.double(), exact[3], rtol=1e-5, atol=1e-2)
