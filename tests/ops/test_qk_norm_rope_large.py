"""Tensors so large that the C++ kernels write them past the caches."""

from dataclasses import replace

import pytest
import torch

from hunyuan_fast.dispatch import implementations
from tests.kit.numerics import assert_equal
from tests.ops.qk_norm_rope_cases import ROOM, assert_right, draw_call, run

pytestmark = pytest.mark.skipif(
    "cpu_impl" not in implementations(ROOM), reason="the native module is not built"
)
OF_ROWS = ("q", "k", "v", "dqkv")
# 8 MiB and more of each of q, k and v; heads of 36 do not start where lines of the cache do.
SIZES = {torch.float32: (700, 24), torch.bfloat16: (1400, 24), torch.float16: (1400, 24)}


@pytest.mark.parametrize("head_dim", [128, 144, 36])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", SIZES, ids=lambda dtype: str(dtype)[6:])
def test_large_tensors_hold_what_small_ones_do(dtype, streams, head_dim, generator):
    rows, heads = SIZES[dtype]
    rows = rows * 128 // head_dim
    sizes = {"batch": 1, "video": rows, "text": 300, "heads": heads, "head_dim": head_dim}
    call = draw_call(generator, **sizes, streams=streams, dtype=dtype)
    few = slice(211, 220)
    part = replace(
        call,
        qkv=call.qkv[:, few],
        tables=tuple(t[few] for t in call.tables),
        text=(),
        gradients=tuple(t[:, few] for t in call.gradients),
    )
    whole = dict(zip(call.names, run("cpu_impl", call), strict=True))
    expected = dict(zip(part.names, run("cpu_impl", part), strict=True))
    for name in OF_ROWS:
        assert_equal(whole[name][:, few], expected[name], name=name)


def test_large_tensors_are_right(generator):
    sizes = {"batch": 2, "video": 500, "text": 900, "heads": 12, "head_dim": 128}
    call = draw_call(generator, **sizes, dtype=torch.bfloat16)
    assert_right(run("cpu_impl", call), call)
