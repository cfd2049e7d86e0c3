"""Tensors so large that the C++ kernels write them past the caches, and what 16 bits hide."""

import pytest
import torch

from hunyuan_fast.dispatch import implementations
from tests.kit.numerics import assert_equal
from tests.ops.fused_modulation_cases import (
    BOTH,
    NORM,
    ROOM,
    assert_right,
    draw_call,
    each_function,
    run,
)

pytestmark = pytest.mark.skipif(
    "cpu_impl" not in implementations(ROOM), reason="the native module is not built"
)
# 8 MiB and more of every output; the second width leaves rows where streaming is not possible
LARGE = [(torch.float32, (2, 300, 4096)), (torch.bfloat16, (2, 530, 4096))]
LARGE += [(torch.bfloat16, (1, 1030, 4104)), (torch.float16, (2, 530, 4096))]
OF_TOKENS = {"residual", "modulated", "dx", "dy"}


@pytest.mark.parametrize("num_vectors", [None, 2])
@pytest.mark.parametrize(("dtype", "shape"), LARGE)
@each_function
def test_large_tensors_hold_what_small_ones_do(function, dtype, shape, num_vectors, generator):
    call = draw_call(function, shape, generator, dtype, num_vectors=num_vectors)
    whole = run("cpu_impl", call)
    few = slice(211, 220)
    length = shape[1]
    part = call.map(lambda t: t[:, few] if t.shape[1:2] == (length,) else t)
    for name, expected in run("cpu_impl", part).items():
        if name in OF_TOKENS:
            assert_equal(whole[name][:, few], expected, name=name)


@pytest.mark.parametrize(("dtype", "shape"), LARGE[:2])
def test_large_tensors_are_right(dtype, shape, generator):
    call = draw_call(BOTH, shape, generator, dtype)
    assert_right(run("cpu_impl", call), call)


@pytest.mark.parametrize("width", [64, 77])
@pytest.mark.parametrize("name", ["shift", "scale"])
def test_a_nan_of_any_bits_stays_one(name, width, generator):
    # Rounded to the upper 16 bits as if it were a number, this one would become -0.
    call = draw_call(NORM, (1, 3, width), generator, torch.bfloat16, vector_dtype=torch.float32)
    bits = torch.full((1,), 0x7FFFFFFF, dtype=torch.int32)
    for column in (0, 9, width - 1):
        vector = call.tensors[name].clone()
        vector[:, column] = bits.view(torch.float32)
        is_nan = run("cpu_impl", call.with_tensors(**{name: vector}))["modulated"].isnan()
        assert is_nan[..., column].all() and is_nan.sum() == 3
