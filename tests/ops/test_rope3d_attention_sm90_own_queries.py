"""Queries of their own on Hopper, forward and gradients, on the emulated machine."""

import importlib

import pytest
import torch

from tests.kit import hopper
from tests.kit.numerics import assert_equal
from tests.ops import rope3d_attention_parts as parts
from tests.ops import test_rope3d_attention_sm90 as sm90
from tests.ops import test_rope3d_attention_sm90_backward as sm90_backward
from tests.ops.rope3d_attention_cases import draw_inputs, judge

# Lq, Lk, D, q_len, kv_len: tiles hold 128 queries (80 or 128 for gradients), and 128 or 176 keys.
CASES = {
    "more keys": (90, 300, 64, [90, 1, 0, 81], [129, 300, 300, 0]),
    "more queries": (290, 130, 128, [290, 257], [129, 1]),
    "no lengths of keys": (129, 177, 128, [128], None),
    "whole tiles": (160, 256, 64, [128], [256]),
}

pytestmark = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


class Emulator:
    """Both passes."""

    def __init__(self) -> None:
        self._forward, self._backward = sm90.Emulator(), sm90_backward.Emulator()
        self.rope3d_attention_forward_hopper = self._forward.rope3d_attention_forward_hopper
        self.rope3d_attention_backward_hopper = self._backward.rope3d_attention_backward_hopper
        self.rope3d_attention_backward_workspace_hopper = (
            self._backward.rope3d_attention_backward_workspace_hopper
        )

    def draw(self, seed: int, processors: int = 3) -> None:
        for each in (self._forward, self._backward):
            each.seed, each.processors = seed, processors


@pytest.fixture
def impl(monkeypatch):
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    module = importlib.import_module(f"hunyuan_fast.kernels.{sm90.ROOM}.cuda_impl")
    sm90.emulated_by(Emulator(), module, monkeypatch)
    return module


def draw(case, generator):
    """Inputs with NaN in their padding, and the rest of a call."""
    num_queries, num_keys, head_dim, queries, lengths = CASES[case]
    batch = len(queries)
    q, _, _, dout = draw_inputs((batch, num_queries, 1, head_dim), generator, torch.bfloat16)
    k, v, *_ = draw_inputs((batch, num_keys, 1, head_dim), generator, torch.bfloat16)
    for x, numbers in ((q, queries), (dout, queries), (k, lengths), (v, lengths)):
        for item, valid in enumerate(numbers or ()):
            x[item, valid:] = torch.nan
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return [q, k, v, dout], kv_len, torch.tensor(queries), head_dim**-0.5


def run(impl, inputs, kv_len, q_len, scale, **way):
    q, k, v, dout = inputs
    out, lse = impl.forward(q, k, v, kv_len, scale, None, q_len, **way)
    return [out, lse, *impl.backward(dout, out, lse, q, k, v, kv_len, scale, q_len)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("key_tile", "cluster"), [(128, 2), (176, 1)])
def test_emulated(case, key_tile, cluster, impl, generator):
    inputs, kv_len, q_len, scale = draw(case, generator)
    impl._C.draw(4 + key_tile + cluster + len(case))
    results = run(impl, inputs, kv_len, q_len, scale, key_tile=key_tile, cluster=cluster)
    lengths = [inputs[1].shape[1]] * len(q_len) if kv_len is None else kv_len.tolist()
    judge("cuda_impl", results, inputs, lengths, scale, q_len.tolist())


@pytest.mark.parametrize("seed", [*hopper.EXTREMES, 5])
def test_the_order_of_things_does_not_matter(seed, impl, generator):
    call = draw("more keys", generator)
    expected = run(impl, *call, cluster=1)
    impl._C.draw(seed, (2, 3, 5, 200)[seed % 4])
    for result, wanted in zip(run(impl, *call, cluster=2), expected, strict=True):
        assert_equal(result, wanted)


def test_lengths_out_of_bounds_are_cut(impl, generator):
    """Of either width, any stride: those on a GPU are not looked at by the host."""
    inputs, *_, scale = draw("more keys", generator)
    inputs = [x.nan_to_num() for x in inputs]
    kv_len, q_len = torch.tensor([129, 300, 0, 7]), torch.tensor([90, 0, 3, 90])
    expected = run(impl, inputs, kv_len, q_len, scale)
    wild = torch.tensor([[129, 2**31 - 1, -5, 7], [91, -1, 3, 2**31 - 1]], dtype=torch.int32)
    found = run(impl, inputs, *wild.T.contiguous().T, scale)
    for result, wanted in zip(found, expected, strict=True):
        assert_equal(result, wanted)


def test_queries_of_the_keys_tokens_are_no_other_case(impl, generator):
    inputs, *_ = draw("whole tiles", generator)
    q, dout = (inputs[i][:, :100] for i in (0, 3))
    inputs = [q, *(x[:, :100] for x in inputs[1:3]), dout]
    numbers = torch.tensor([77])
    expected = run(impl, inputs, numbers, None, 0.125)
    for result, wanted in zip(run(impl, inputs, numbers, numbers, 0.125), expected, strict=True):
        assert_equal(result, wanted)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_parts_of_the_keys_come_to_the_whole(head_dim, impl, generator):
    truth = parts.draw_truth(generator, torch.bfloat16, head_dim)
    impl._C.draw(7)
    parts.judge_parts("cuda_impl", impl, truth)


def test_a_row_that_saw_no_key_at_all_takes_no_part(impl, generator):
    q, k, v, dout = draw_inputs((1, 100, 1, 64), generator, torch.bfloat16)
    q_len, shorter = torch.tensor([90]), torch.tensor([89])
    out, lse = impl.forward(q, k, v, None, 0.125, None, q_len)
    out[:, 89], lse[:, :, 89] = 0, -torch.inf
    found = impl.backward(dout, out, lse, q, k, v, None, 0.125, q_len)
    expected = impl.backward(dout, out, lse, q, k, v, None, 0.125, shorter)
    for result, wanted in zip(found, expected, strict=True):
        assert_equal(result, wanted)


def test_empty_ones_are_declined(impl):
    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    reason = impl.supports(q, q[:, :0], q[:, :0], None, 0.125, None, torch.ones(1))
    assert "the shapes of q and k are (1, 4, 1, 64) and (1, 0, 1, 64)" in reason
