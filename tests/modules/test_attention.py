"""Self-attention against torch's, one sample at a time."""

import torch
from torch.nn import functional as F

from hunyuan_fast.modules.attention import attend, split_heads


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
