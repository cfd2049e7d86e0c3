"""Layers that take a clip in parts give what they give of it whole."""

import pytest
import torch

from hunyuan_fast.ops import (
    causal_conv3d,
    frame_causal_attention,
    group_norm_silu,
    group_norm_stats,
    merge_group_norm_stats,
    upsample_causal_conv3d,
)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_convolution_continues_a_clip(generator, poison, batch, stride, size, cut):
    x = torch.randn(batch, 5, 7, *size, generator=generator)
    weight = torch.randn(6, 5, 3, 3, 3, generator=generator) / 10
    bias = torch.randn(6, generator=generator)
    whole = causal_conv3d(x, weight, bias, stride=stride)
    first = causal_conv3d(x[:, :, :cut], weight, bias, stride=stride)
    # the next output looks at two frames before input frame number stride * outputs so far
    before = cut + 2 - stride[0] * first.shape[2]
    frames = torch.cat((x[:, :, :1], x[:, :, :1], x[:, :, :cut]), 2)
    if before + 7 - cut >= 3:
        past = frames[:, :, -before:]
        rest = causal_conv3d(x[:, :, cut:], weight, bias, stride=stride, past=past)
        close(torch.cat((first, rest), 2), whole)
    else:
        close(first, whole)


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_upsampling_continues_a_clip(generator, poison, factor, cut):
    x = torch.randn(2, 4, 5, 3, 5, generator=generator)
    weight = torch.randn(6, 4, 3, 3, 3, generator=generator) / 10
    bias = torch.randn(6, generator=generator)
    whole = upsample_causal_conv3d(x, weight, bias, factor=factor)
    first = upsample_causal_conv3d(x[:, :, :cut], weight, bias, factor=factor)
    frames = torch.cat((x[:, :, :1], x[:, :, :cut]), 2)
    past = frames[:, :, -(1 if factor[0] == 2 else 2) :]
    rest = upsample_causal_conv3d(x[:, :, cut:], weight, bias, factor=factor, past=past)
    assert rest.shape[2] == (5 - cut) * factor[0]
    close(torch.cat((first, rest), 2), whole)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_norm_of_parts_with_the_statistics_of_the_whole(generator, poison, silu, offset):
    x = torch.randn(2, 6, 5, 4, 3, generator=generator, dtype=torch.float64) + offset
    weight, bias = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    parts = x.split((1, 3, 1), dim=2)
    stats = merge_group_norm_stats([group_norm_stats(part, 3) for part in parts])
    close(stats, group_norm_stats(x, 3), 1e-8)
    normed = [group_norm_silu(p, 3, weight, bias, silu=silu, stats=stats) for p in parts]
    expected = torch.nn.functional.group_norm(x, 3, weight, bias, 1e-6)
    close(torch.cat(normed, 2), torch.nn.functional.silu(expected) if silu else expected, 1e-8)


def test_statistics_are_count_mean_and_squares(generator):
    x = torch.randn(2, 6, 2, 3, 4, generator=generator)
    groups = x.view(2, 3, -1).double()
    squares = groups.var(2, correction=0) * 48
    expected = torch.stack((torch.full((2, 3), 48.0).double(), groups.mean(2), squares))
    close(group_norm_stats(x, 3), expected)
    assert group_norm_stats(x.bfloat16(), 3).dtype == torch.float64
    with pytest.raises(ValueError, match="parts must hold at least one"):
        merge_group_norm_stats([])


def test_the_last_frames_of_a_clip_attend_to_all_of_it(generator):
    q, k, v = torch.randn(3, 2, 20, 1, 8, generator=generator)
    whole = frame_causal_attention(q, k, v, tokens_per_frame=4)
    close(frame_causal_attention(q[:, 8:], k, v, tokens_per_frame=4), whole[:, 8:])
    with pytest.raises(ValueError, match="k must hold at least as many frames as q"):
        frame_causal_attention(q, k[:, :16], v[:, :16], tokens_per_frame=4)
    with pytest.raises(ValueError, match="k must hold whole frames of tokens_per_frame = 4"):
        frame_causal_attention(q[:, :4], k[:, :7], v[:, :7], tokens_per_frame=4)
