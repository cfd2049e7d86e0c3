"""The causal convolution by the library's kernels: oneDNN on the CPU, cuDNN on GPUs.

The edges are copied into a padded map, which those kernels need; the repeated map of an upsampling
is never built, see ``phases``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast.kernels.causal_conv3d import cudnn
from hunyuan_fast.kernels.causal_conv3d.phases import (
    begins_alone,
    phase_weights,
    phase_weights_backward,
    sum_in_time,
    wide,
)
from hunyuan_fast.kernels.causal_conv3d.reference import full_precision

VERIFIED_ON = frozenset({"cpu"})

Triple = tuple[int, int, int]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# On the CPU torch answers 3D convolutions of a batch of one, with at most this many values in
# (channels, frames, rows), by a fallback several times slower than oneDNN; never 2D convolutions.
_SLOW_CONV3D_LIMIT = 20480
_ONES = (1, 1, 1)
_convolution_backward = torch.ops.aten.convolution_backward.default


def supports(x: Tensor, weight: Tensor, *_: object) -> str | None:
    """None, or why the library's kernels cannot answer this call."""
    if x.device.type not in ("cpu", "cuda"):
        return f"x must be on the CPU or a CUDA device, it is on {x.device}"
    if not x.shape[0]:
        return f"x must have samples, its shape is {tuple(x.shape)}"
    return cudnn.objection(x, weight)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (B, O, T', H', W'), channels-last."""
    with torch.autocast(x.device.type, enabled=False), full_precision(x):
        if scale is not None and shift is not None:
            x = activated(x, scale, shift)
            past = None if past is None else activated(past, scale, shift)
        if factor is None:
            y = _forward_plain(x, weight, bias, stride, past)
        else:
            y = _forward_upsampled(x, weight, bias, past, factor)
        if residual is not None:
            y = y.add_(residual)
        return y.contiguous(memory_format=torch.channels_last_3d)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    wants: tuple[bool, bool, bool, bool],
) -> Gradients:
    """dx, dweight, dbias and dpast, each where it is wanted."""
    want_x, want_weight, want_bias, want_past = wants
    dx = dweight = dbias = dpast = None
    with torch.autocast(x.device.type, enabled=False), full_precision(x):
        if want_x or want_weight or want_past:
            clip = want_x or want_past
            if factor is None:
                dclip, dweight = _backward_plain(dy, x, weight, stride, past, clip, want_weight)
            else:
                dclip, dweight = _backward_upsampled(dy, x, weight, past, factor, clip, want_weight)
            if dclip is not None:
                before = dclip.shape[2] - x.shape[2]
                dx = _part(dclip[:, :, before:], x.dtype) if want_x else None
                dpast = _part(dclip[:, :, :before], x.dtype) if want_past else None
        if want_bias:
            dbias = dy.sum((0, 2, 3, 4), dtype=wide(dy.dtype)).to(dy.dtype)
    return dx, dweight, dbias, dpast


def _part(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def activated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """silu(x * scale + shift), computed in the dtype of scale and rounded to that of x."""
    gain, offset = (v[:, :, None, None, None] for v in (scale, shift))
    return F.silu(torch.addcmul(offset, x.to(scale.dtype), gain), inplace=True).to(x.dtype)


# ---- plain


def _forward_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, past: Tensor | None
) -> Tensor:
    if _is_pointwise(weight, stride):
        # a matrix product over channels-last values
        rows = _joined(x, past).movedim(1, -1)
        return F.linear(rows, weight.flatten(1), bias).movedim(-1, 1)
    if begins_alone(x, past):
        weight, stride = sum_in_time(weight), (1, *stride[1:])
    padded = _padded(x, past, _margins(weight, past))
    return _valid(padded, weight, bias, stride)


def _backward_plain(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Triple,
    past: Tensor | None,
    want_clip: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of [past, x] and of the weight."""
    if _is_pointwise(weight, stride):
        return _backward_pointwise(dy, _joined(x, past), weight, want_clip, want_weight)
    taps = weight.shape[2]
    if begins_alone(x, past):
        weight, stride = sum_in_time(weight), (1, *stride[1:])
    margins = _margins(weight, past)
    padded = _padded(x, past, margins)
    dpadded, dweight = _valid_backward(dy, padded, weight, stride, want_clip, want_weight)
    if dweight is not None:
        repeats = taps // weight.shape[2]
        dweight = dweight.repeat_interleave(repeats, 2) if repeats > 1 else dweight.contiguous()
    return None if dpadded is None else margins.fold(dpadded), dweight


def _is_pointwise(weight: Tensor, stride: Triple) -> bool:
    return weight.shape[2:] == _ONES and stride == _ONES


def _backward_pointwise(
    dy: Tensor, clip: Tensor, weight: Tensor, want_clip: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows, matrix = dy.movedim(1, -1), weight.flatten(1)
    dclip = dweight = None
    if want_clip:
        dclip = (rows @ matrix).movedim(-1, 1)
    if want_weight:
        seen = clip.movedim(1, -1).flatten(0, 3)
        dweight = (rows.flatten(0, 3).T @ seen).view(weight.shape)
    return dclip, dweight


# ---- upsampled


@dataclass(frozen=True)
class _Phase:
    """One parity of the outputs: which of them, and what of the padded map they are made of."""

    outputs: tuple[slice, ...]
    window: tuple[slice, ...]

    def of(self, y: Tensor) -> Tensor:
        return y[(..., *self.outputs)]

    def under(self, padded: Tensor) -> Tensor:
        return padded[(..., *self.window)]


def _phases(x: Tensor, factor: Triple, continued: bool) -> Iterator[_Phase]:
    """In the order of ``phase_weights``.

    Of a clip's first frames the odd ones of a doubled time axis are one frame later and one less;
    in the middle of a clip both start at the frame before.
    """
    height, width = x.shape[3:]
    for t, h, w in product(*map(range, factor)):
        space = tuple(
            slice(parity, parity + size + 2 - (doubling - 1))
            for parity, size, doubling in ((h, height, factor[1]), (w, width, factor[2]))
        )
        first = 0 if continued else t
        outputs = tuple(map(slice, (t, h, w), (None,) * 3, factor))
        yield _Phase(outputs, (slice(first, None), *space))


def _forward_upsampled(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, factor: Triple
) -> Tensor:
    batch, _, frames, height, width = x.shape
    if begins_alone(x, past):
        weight, factor = sum_in_time(weight), (1, *factor[1:])
    t, h, w = factor
    length = frames * t if past is not None else 1 + (frames - 1) * t
    shape = (batch, weight.shape[0], length, height * h, width * w)
    y = _new_map(x, shape)
    kernels = phase_weights(weight, factor, past is not None)
    padded = _padded(x, past, _margins(kernels[0], past, upsampled=True))
    for kernel, phase in zip(kernels, _phases(x, factor, past is not None), strict=True):
        phase.of(y).copy_(_valid(phase.under(padded), kernel, bias, _ONES))
    return y


def _backward_upsampled(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    factor: Triple,
    want_clip: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of [past, x] and of the weight."""
    taps, continued = weight.shape[2], past is not None
    if begins_alone(x, past):
        weight, factor = sum_in_time(weight), (1, *factor[1:])
    kernels = phase_weights(weight, factor, continued)
    margins = _margins(kernels[0], past, upsampled=True)
    padded = _padded(x, past, margins)
    dpadded = None
    if want_clip:
        # phases add up: not in 16 bits
        dpadded = _new_map(x, padded.shape, wide(x.dtype)).zero_()
    dkernels = []
    for kernel, phase in zip(kernels, _phases(x, factor, continued), strict=True):
        dwindow, dkernel = _valid_backward(
            phase.of(dy), phase.under(padded), kernel, _ONES, want_clip, want_weight
        )
        if dpadded is not None:
            phase.under(dpadded).add_(dwindow)
        if dkernel is not None:
            dkernels.append(dkernel.to(wide(dkernel.dtype)))
    dweight = None
    if want_weight:
        dweight = phase_weights_backward(dkernels, factor, continued).to(weight.dtype)
        repeats = taps // weight.shape[2]
        dweight = dweight.repeat_interleave(repeats, 2) if repeats > 1 else dweight.contiguous()
    return None if dpadded is None else margins.fold(dpadded), dweight


# ---- the padded map


@dataclass(frozen=True)
class Margins:
    """How often the first frame stands before the map, and edges of rows and columns beside it."""

    frames: int
    rows: int
    columns: int

    def fold(self, padded: Tensor) -> Tensor:
        """The gradient of the map from that of the padded one, which is written into."""
        for dim, before, after in (
            *((4, self.columns, self.columns), (3, self.rows, self.rows)),
            (2, self.frames, 0),
        ):
            size = padded.shape[dim] - before - after
            kept = padded.narrow(dim, before, size)
            if before:
                _sum_into(kept.narrow(dim, 0, 1), padded.narrow(dim, 0, before + 1), dim)
            if after:
                end = padded.narrow(dim, before + size - 1, after + 1)
                _sum_into(kept.narrow(dim, size - 1, 1), end, dim)
            padded = kept
        return padded


def _sum_into(edge: Tensor, parts: Tensor, dim: int) -> None:
    edge.copy_(parts.sum(dim, keepdim=True, dtype=wide(parts.dtype)))


def _margins(weight: Tensor, past: Tensor | None, upsampled: bool = False) -> Margins:
    """For a kernel, or for one phase of it, which has one tap in a margin in any case."""
    lead = weight.shape[2] - 1
    if upsampled:
        return Margins(lead - (0 if past is None else past.shape[2]), 1, 1)
    rows, columns = (size // 2 for size in weight.shape[3:])
    return Margins(lead if past is None else 0, rows, columns)


def _padded(x: Tensor, past: Tensor | None, margins: Margins) -> Tensor:
    """[past, x] with its margins."""
    if x.device.type == "cpu" and (past is None or not past.shape[2]):
        rows, columns = margins.rows, margins.columns
        return F.pad(x, (columns, columns, rows, rows, margins.frames, 0), mode="replicate")
    # On GPUs that gives a map in torch's usual layout, which a convolution would have to copy.
    return padded_channels_last(x, past, margins)


def padded_channels_last(x: Tensor, past: Tensor | None, margins: Margins) -> Tensor:
    """[past, x] with its margins, channels-last: a copy, and edges of that."""
    rows, columns = margins.rows, margins.columns
    batch, channels, frames, height, width = x.shape
    given = 0 if past is None else past.shape[2]
    lead = margins.frames + given
    size = lead + frames, height + 2 * rows, width + 2 * columns
    padded = _new_map(x, (batch, channels, *size))
    inner = padded[:, :, :, rows : rows + height, columns : columns + width]
    inner[:, :, lead:] = x
    if past is not None and given:
        inner[:, :, margins.frames : lead] = past
    inner[:, :, : margins.frames] = inner[:, :, margins.frames : margins.frames + 1]
    for dim, margin, length in ((3, rows, height), (4, columns, width)):
        if margin:
            first, last = (padded.narrow(dim, margin + n, 1) for n in (0, length - 1))
            padded.narrow(dim, 0, margin).copy_(first)
            padded.narrow(dim, margin + length, margin).copy_(last)
    return padded


def _joined(x: Tensor, past: Tensor | None) -> Tensor:
    return x if past is None or not past.shape[2] else torch.cat((past, x), dim=2)


def _new_map(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last_3d
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


# ---- without padding


def _valid(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple) -> Tensor:
    """3D convolution without padding, in whichever form the library runs fastest."""
    if not _is_slow_in_3d(x):
        return F.conv3d(x, weight, bias, stride)
    stacked = _stacked(x, weight.shape[2], stride[0])
    out = F.conv2d(stacked, _flat(weight), bias, stride[1:])
    return out.transpose(0, 1).unsqueeze(0)


def _valid_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Triple, want_x: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    wants = [want_x, want_weight, False]
    if not _is_slow_in_3d(x):
        dx, dweight, _ = _convolution_backward(
            dy, x, weight, None, stride, [0] * 3, [1] * 3, False, [0] * 3, 1, wants
        )
        return dx, dweight
    taps = weight.shape[2]
    stacked = _stacked(x, taps, stride[0])
    flat_dy, flat = dy[0].transpose(0, 1), _flat(weight)
    dstacked, dflat, _ = _convolution_backward(
        flat_dy, stacked, flat, None, stride[1:], [0] * 2, [1] * 2, False, [0] * 2, 1, wants
    )
    dx = dweight = None
    if want_x:
        gradient = x.new_zeros((*x.shape[1:],), dtype=wide(x.dtype))
        parts = dstacked.transpose(0, 1).unflatten(0, (taps, -1))
        for tap in range(taps):
            gradient[:, _frames(tap, dy.shape[2], stride[0])] += parts[tap]
        dx = gradient.to(x.dtype).unsqueeze(0)
    if want_weight:
        dweight = dflat.unflatten(1, (taps, -1)).transpose(1, 2)
    return dx, dweight


def _is_slow_in_3d(x: Tensor) -> bool:
    batch, channels, frames, height, _ = x.shape
    small = batch == 1 and channels * frames * height <= _SLOW_CONV3D_LIMIT
    return small and x.device.type == "cpu"


def _frames(tap: int, count: int, stride: int) -> slice:
    return slice(tap, tap + (count - 1) * stride + 1, stride)


def _stacked(x: Tensor, taps: int, stride: int) -> Tensor:
    """For each output frame its input frames (T', KT C, H, W): a 2D convolution does the rest."""
    count = (x.shape[2] - taps) // stride + 1
    frames = [x[0][:, _frames(tap, count, stride)] for tap in range(taps)]
    return torch.cat(frames).transpose(0, 1)


def _flat(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).flatten(1, 2)
