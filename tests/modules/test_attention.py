"""Self-attention against torch's, one sample at a time."""

import pytest
import torch
from torch.nn import functional as F

from hunyuan_fast.modules.attention import JointAttention, attend, split_heads
from hunyuan_fast.ops import fp8_attention


def test_equals_torch_per_sample(generator):
    q, k, v = torch.randn(3, 2, 17, 3, 16, generator=generator)
    kv_len = torch.tensor([17, 13], dtype=torch.int32)
    joined = attend(q, k, v, kv_len)

    for i, valid in enumerate(kv_len.tolist()):
        sample = (x[i, :valid].transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*sample)
        torch.testing.assert_close(joined[i, :valid], expected.transpose(0, 1).flatten(1))
        assert not joined[i, valid:].any()


def test_split_heads_reads_queries_keys_values_then_heads():
    packed = torch.arange(2 * 5 * 24.0).view(2, 5, 24)
    q, k, v = split_heads(packed, 4)
    for i, part in enumerate((q, k, v)):
        assert part.shape == (2, 5, 4, 2)
        assert part.data_ptr() == packed[..., 8 * i :].data_ptr(), "views, not copies"
        assert torch.equal(part[1, 2, 3], packed[1, 2, 8 * i + 6 : 8 * i + 8])


def test_joint_attention_equals_torch_and_writes_where_told(generator):
    q, k, v = torch.randn(3, 2, 17, 3, 16, generator=generator)
    kv_len = torch.tensor([17, 13], dtype=torch.int32)
    joint = JointAttention()
    expected = attend(q, k, v, kv_len)
    assert torch.equal(joint(q, k, v, kv_len).flatten(2), expected)

    beside = torch.full((2, 17, 3 * 16 + 5), 7.0)
    out = beside[..., : 3 * 16].unflatten(-1, (3, 16))
    assert joint(q, k, v, kv_len, out) is out
    assert torch.equal(beside[..., : 3 * 16], expected)
    assert (beside[..., 3 * 16 :] == 7).all()


def test_joint_attention_in_fp8_is_the_op_and_has_no_gradients(generator):
    q, k, v = torch.randn(3, 2, 17, 3, 16, generator=generator)
    kv_len = torch.tensor([17, 13], dtype=torch.int32)
    joint = JointAttention()
    joint.set(precision="fp8")
    out = torch.empty(2, 17, 3, 16)
    assert joint(q, k, v, kv_len, out) is out
    assert torch.equal(out, fp8_attention(q, k, v, kv_len=kv_len))
    assert torch.equal(out, joint(q, k, v, kv_len))
    with pytest.raises(ValueError, match="fp8 attention is for inference"):
        joint(q.requires_grad_(), k, v, kv_len)


def test_joint_attention_leaves_no_trace_in_a_state_dict():
    joint = JointAttention()
    assert not joint.state_dict()
    assert not list(joint.parameters())


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"attention precision must be 'same'.*, got 'int3'"):
        JointAttention().set(precision="int3")
