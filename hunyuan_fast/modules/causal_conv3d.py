"""The 3D convolution of the VAE: symmetric in space, looking only backwards in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On the CPU torch answers 3D convolutions of a batch of one, with at most this many values in
# (channels, frames, rows), by a fallback several times slower than oneDNN; never 2D convolutions.
_SLOW_CONV3D_LIMIT = 20480


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    past: Tensor | None = None,
) -> Tensor:
    """Convolve with edge values repeated in space and the first frame repeated before time zero.

    x (B, C, T, H, W); weight (O, C, K, K, K) with K odd; bias (O,); stride in (t, h, w);
    past (B, C, P, H, W): frames that stand before x instead of repetitions of its first one,
    so that x continues a clip.
    Returns (B, O, T', (H-1)//sh + 1, (W-1)//sw + 1) in x.dtype, T' = (T-1)//st + 1 without past
    and (P+T-K)//st + 1 with it.
    Source: technical report, section 4.1 (CausalConv3D).
    """
    side = weight.shape[-1] // 2
    if side == 0 and stride == (1, 1, 1):
        # a matrix product over channels-last values
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if past is not None:
        return conv3d_valid(pad_after(past, x, side), weight, bias, stride=stride)
    if x.shape[2] == 1:
        # every temporal tap sees the one frame there is, so the taps add up
        weight = weight.sum(2, keepdim=True)
    padded = pad_edges(x, side, weight.shape[2] - 1)
    return conv3d_valid(padded, weight, bias, stride=stride)


def pad_edges(x: Tensor, space: int, past: int) -> Tensor:
    """Repeat the edges of x (B, C, T, H, W): `space` at each side, `past` frames at the front."""
    # autocast on the CPU would pad in fp32 and round again
    with torch.autocast(x.device.type, enabled=False):
        return F.pad(x, (space, space, space, space, past, 0), mode="replicate")


def pad_after(past: Tensor, x: Tensor, space: int) -> Tensor:
    """The frames of past, then those of x, with the edges in space repeated, in one new map."""
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, past.shape[2] + frames, height + 2 * space, width + 2 * space)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    inner = out[:, :, :, space : space + height, space : space + width]
    inner[:, :, : past.shape[2]] = past
    inner[:, :, past.shape[2] :] = x
    for step in range(space):
        # rows first, then whole columns: the corners come with them
        out[:, :, :, step] = out[:, :, :, space]
        out[:, :, :, -1 - step] = out[:, :, :, -1 - space]
    for step in range(space):
        out[..., step] = out[..., space]
        out[..., -1 - step] = out[..., -1 - space]
    return out


def conv3d_valid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """3D convolution without padding, in whichever form the library runs fastest.

    x (B, C, T, H, W); weight (O, C, KT, KH, KW). Returns (B, O, T', H', W').
    """
    batch, channels, frames, height, _ = x.shape
    small = batch == 1 and channels * frames * height <= _SLOW_CONV3D_LIMIT
    if not (small and x.device.type == "cpu"):
        return F.conv3d(x, weight, bias, stride)
    taps = weight.shape[2]
    starts = range(frames - taps + 1)[:: stride[0]]
    # each output frame is a 2D convolution of its input frames, stacked as channels
    stacked = torch.cat([x[0, :, tap : starts[-1] + tap + 1 : stride[0]] for tap in range(taps)])
    flat_weight = weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(stacked.transpose(0, 1), flat_weight, bias, stride[1:])
    return out.transpose(0, 1).unsqueeze(0)


class CausalConv3d(nn.Module):
    """Parameters of one causal convolution; `conv.weight` and `conv.bias` are the checkpoint names.

    (B, in_channels, T, H, W) -> (B, out_channels, T', H', W'), see `causal_conv3d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv3d(x, self.conv.weight, self.conv.bias, stride=self.stride)
