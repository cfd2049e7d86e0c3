"""Changing the size of a feature map of the VAE; the first frame stands alone in time."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.modules.causal_conv3d import CausalConv3d, conv3d_valid, pad_after, pad_edges

Factor = tuple[int, int, int]


def upsample_causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: Factor,
    past: Tensor | None = None,
) -> Tensor:
    """Repeat pixels by factor, the first frame in space only, then convolve causally.

    x (B, C, T, H, W); weight (O, C, 3, 3, 3); bias (O,); factor (t, h, w), each 1 or 2;
    past (B, C, P, H, W): the frames before x, when x continues a clip: one when time is doubled,
    else two (with fewer behind it, the clip's first frame once more).
    Returns (B, O, T', H*h, W*w) in x.dtype, T' = 1 + (T-1)*t without past and T*t with it.

    The repeated map is never built: of the three taps along a doubled axis two always meet the same
    input value, so each output parity is a convolution of x with two taps, one of them a sum.
    With factor (2, 2, 2) this takes 8/27 of the multiplications, with (1, 2, 2) 4/9.
    """
    frames, height, width = x.shape[2:]
    if frames == 1 and past is None:
        # every temporal tap sees the one frame there is, so the taps add up
        weight, factor = weight.sum(2, keepdim=True), (1, *factor[1:])
    # sums of half-precision taps are rounded once, at the end
    kernels = [weight.float() if weight.dtype.itemsize == 2 else weight]
    for dim, doubling in zip((2, 3, 4), factor, strict=True):
        kernels = [k for kernel in kernels for k in _parity_kernels(kernel, dim, doubling)]
    taps_t, taps_h, taps_w = kernels[0].shape[2:]
    if past is None:
        padded = pad_edges(x, 1, taps_t - 1)
    else:
        padded = pad_after(past[:, :, past.shape[2] + 1 - taps_t :], x, 1)
        # what continues a clip begins with an odd frame, which the even one after it shares its
        # window with
        half = len(kernels) // factor[0]
        kernels = kernels[-half:] + kernels[:-half]
    parts = []
    for (t, h, w), kernel in zip(product(*map(range, factor)), kernels, strict=True):
        start = t if past is None else 0
        window = padded[:, :, start:, h : h + height + taps_h - 1, w : w + width + taps_w - 1]
        parts.append(conv3d_valid(window, kernel.to(weight.dtype), bias))
    return _Interleave.apply(factor, *parts)


def _parity_kernels(weight: Tensor, dim: int, factor: int) -> list[Tensor]:
    """The kernels, one for each output parity, that act along dim before the map is repeated."""
    if factor == 1:
        return [weight]
    first, middle, last = weight.unbind(dim)
    return [torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)]


class _Interleave(torch.autograd.Function):
    """Lay the parities (B, O, T, H, W) of an upsampled map into one channels-last tensor.

    Along a doubled time axis the second parity may have one frame less than the first.
    """

    @staticmethod
    def forward(ctx: Any, factor: Factor, *parts: Tensor) -> Tensor:
        ctx.factor = factor
        batch, channels, _, height, width = parts[0].shape
        frames = sum(part.shape[2] for part in parts) // (factor[1] * factor[2])
        shape = (batch, channels, frames, height * factor[1], width * factor[2])
        out = parts[0].new_empty(shape).contiguous(memory_format=torch.channels_last_3d)
        for view, part in zip(_parities(out, factor), parts, strict=True):
            view.copy_(part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_parities(grad, ctx.factor)


def _parities(x: Tensor, factor: Factor) -> list[Tensor]:
    return [
        x[:, :, t :: factor[0], h :: factor[1], w :: factor[2]]
        for t, h, w in product(*map(range, factor))
    ]


class CausalDownsample(nn.Module):
    """A causal convolution with stride; T becomes (T-1)//st + 1, H and W are divided."""

    def __init__(self, channels: int, stride: Factor) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CausalUpsample(nn.Module):
    """Upsampling and a causal convolution in one, see `upsample_causal_conv3d`."""

    def __init__(self, channels: int, factor: Factor) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv.conv
        return upsample_causal_conv3d(x, conv.weight, conv.bias, factor=self.factor)
