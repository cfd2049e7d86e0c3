"""Self-attention against torch's, one sample at a time, with rotation as complex multiplication."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast.modules.attention import self_attention, split_heads
from hunyuan_fast.modules.rotary import Tables, rotary_tables

GRID, DIMS = (2, 2, 3), (4, 6, 6)


def rotated(x: Tensor, tables: Tables) -> Tensor:
    turn = torch.complex(*(table[:, None, ::2].double() for table in tables))
    video = torch.view_as_complex(x[: len(turn)].double().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(video * turn).flatten(-2).to(x.dtype)
    return torch.cat((turned, x[len(turn) :]))


@pytest.mark.parametrize("rotate", [True, False])
def test_equals_torch_per_sample(generator, rotate):
    tables = rotary_tables(GRID, DIMS, 256.0, torch.device("cpu")) if rotate else None
    q, k, v = torch.randn(3, 2, 17, 3, 16, generator=generator)
    kv_len = torch.tensor([17, 13], dtype=torch.int32)
    joined = self_attention(q, k, v, kv_len, tables)

    for i, valid in enumerate(kv_len.tolist()):
        sample = [x[i, :valid] for x in (q, k, v)]
        if tables is not None:
            sample[:2] = [rotated(x, tables) for x in sample[:2]]
        expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sample))
        torch.testing.assert_close(joined[i, :valid], expected.transpose(0, 1).flatten(1))
        assert not joined[i, valid:].any()


def test_split_heads_reads_queries_keys_values_then_heads():
    packed = torch.arange(2 * 5 * 24.0).view(2, 5, 24)
    q, k, v = split_heads(packed, 4)
    for i, part in enumerate((q, k, v)):
        assert part.shape == (2, 5, 4, 2)
        assert part.data_ptr() == packed[..., 8 * i :].data_ptr(), "views, not copies"
        assert torch.equal(part[1, 2, 3], packed[1, 2, 8 * i + 6 : 8 * i + 8])
