"""The modules hand their parameters to the op and keep the names of torch's group norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_fast.modules.group_norm import GroupNorm, GroupNormSiLU
from hunyuan_fast.ops import group_norm_stats, merge_group_norm_stats


def drawn(kind, generator):
    norm = kind(4, 8)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3, generator=generator)
    return norm


@pytest.mark.parametrize("kind", [GroupNorm, GroupNormSiLU])
def test_it_is_torchs_group_norm_with_silu_or_without(kind, generator):
    norm = drawn(kind, generator)
    x = torch.randn(2, 8, 3, 5, 4, generator=generator)
    expected = F.group_norm(x, 4, norm.weight, norm.bias, 1e-6)
    expected = F.silu(expected) if kind is GroupNormSiLU else expected
    torch.testing.assert_close(norm(x), expected)
    assert norm.eps == 1e-6
    assert list(norm.state_dict()) == list(nn.GroupNorm(4, 8).state_dict())


@pytest.mark.parametrize("kind", [GroupNorm, GroupNormSiLU])
def test_chunks_with_the_statistics_of_the_whole_are_the_whole(kind, generator):
    norm = drawn(kind, generator)
    x = torch.randn(2, 8, 5, 4, 4, generator=generator)
    chunks = x.split(2, dim=2)
    stats = merge_group_norm_stats([group_norm_stats(chunk, 4) for chunk in chunks])
    with torch.no_grad():
        pieces = torch.cat([norm(chunk, stats) for chunk in chunks], dim=2)
        torch.testing.assert_close(pieces, norm(x), rtol=1e-6, atol=1e-6)


def test_statistics_span_time(generator):
    norm = GroupNormSiLU(4, 8)
    x = torch.randn(1, 8, 2, 4, 4, generator=generator)
    changed = x.clone()
    changed[:, :, 1] *= 3
    assert (norm(x)[:, :, 0] - norm(changed)[:, :, 0]).abs().max() > 0.01
