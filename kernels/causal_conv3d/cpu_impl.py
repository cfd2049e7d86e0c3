"""The causal convolution in fp32 by the C++ kernel: edges by index, phases in place, no padded map.

Forward only: gradients are the library's.
"""

from itertools import product

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.causal_conv3d import library_impl
from hunyuan_fast.kernels.causal_conv3d.phases import begins_alone, phase_weights, sum_in_time

VERIFIED_ON = frozenset({"cpu"})
_MOST_TAPS = 27  # kMaxTaps in csrc/causal_conv3d/cpu_kernels.h
_LAYOUT = torch.channels_last_3d
# Positions of a frame: with fewer, making a kernel takes longer than the multiplications it saves.
_WORTH_A_KERNEL = 1024

Triple = tuple[int, int, int]

backward = library_impl.backward


def supports(x: Tensor, weight: Tensor, *_: object) -> str | None:
    """None, or why the C++ kernel cannot answer this call."""
    if x.device.type != "cpu":
        return f"x must be on the CPU, it is on {x.device}"
    if x.dtype != torch.float32:
        return f"x must be float32, it is {x.dtype}"
    if not x.shape[0]:
        return f"x must have samples, its shape is {tuple(x.shape)}"
    if weight[0, 0].numel() > _MOST_TAPS:
        return f"weight must have at most {_MOST_TAPS} taps, its shape is {tuple(weight.shape)}"
    return None


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
    if scale is not None and shift is not None:
        x = library_impl.activated(x, scale, shift)
        past = None if past is None else library_impl.activated(past, scale, shift)
    bias = None if bias is None else bias.contiguous()
    if factor is None:
        return _plain(x, weight, bias, stride, past, residual)
    return _upsampled(x, weight, bias, past, factor)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    batch, _, frames, height, width = x.shape
    taps, rows, columns = weight.shape[2:]
    lead = taps - 1 if past is None else past.shape[2]
    lengths = (frames + lead - taps + 1, height, width)
    sizes = ((n - 1) // step + 1 for n, step in zip(lengths, stride, strict=True))
    y = _new_map((batch, weight.shape[0], *sizes))
    if residual is not None:
        residual = _channels_last(residual)
    origin = (lead, rows // 2, columns // 2)
    _run(x, past, weight, bias, residual, y, stride, origin)
    return y


def _upsampled(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, factor: Triple
) -> Tensor:
    """Every output parity is a convolution of x that writes its own places of the result."""
    batch, _, frames, height, width = x.shape
    if begins_alone(x, past):  # and has one frame alone: there is nothing to double in time
        weight, factor = sum_in_time(weight), (1, *factor[1:])
    continued = past is not None
    t, h, w = factor
    length = frames * t if continued else 1 + (frames - 1) * t
    y = _new_map((batch, weight.shape[0], length, height * h, width * w))
    kernels = phase_weights(weight, factor, continued)
    for parity, kernel in zip(product(*map(range, factor)), kernels, strict=True):
        places = tuple(slice(p, None, f) for p, f in zip(parity, factor, strict=True))
        lead = kernel.shape[2] - 1 - (0 if continued else parity[0])
        origin = (lead, 1 - parity[1], 1 - parity[2])
        _run(x, past, kernel, bias, None, y[(..., *places)], (1, 1, 1), origin)
    return y


def _run(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    stride: Triple,
    origin: Triple,
) -> None:
    """y(o) = sum over taps k of weight(k) x(o * stride + k - origin); y may have any strides.

    At the beginning of a clip some taps in time read the same frame, the first. They are added up:
    a third of the multiplications for the first frame, two thirds for the second. Each needs a
    kernel of its own, which pays for itself where frames are large or there are no others.
    """
    x = _channels_last(x)
    lead, *sides = origin
    if past is not None and past.shape[2]:
        _convolve(x, _channels_last(past), weight, bias, residual, y, stride, origin)
        return
    begun, alone = 0, y.shape[2] * stride[0] <= lead
    worth = alone or y[0, 0, 0].numel() >= _WORTH_A_KERNEL
    while worth and begun < y.shape[2] and begun * stride[0] < lead:
        alike = min(lead - begun * stride[0] + 1, weight.shape[2])
        first = weight[:, :, :alike].sum(2, keepdim=True)
        merged = torch.cat((first, weight[:, :, alike:]), dim=2)
        frame = slice(begun, begun + 1)
        rest = None if residual is None else residual[:, :, frame]
        _convolve(x, None, merged, bias, rest, y[:, :, frame], stride, (0, *sides))
        begun += 1
    rest = None if residual is None else residual[:, :, begun:]
    origin = (lead - begun * stride[0], *sides)
    _convolve(x, None, weight, bias, rest, y[:, :, begun:], stride, origin)


def _convolve(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    stride: tuple[int, ...],
    origin: tuple[int, ...],
) -> None:
    if not y.numel():
        return
    channels, kernel = weight.shape[1], tuple(weight.shape[2:])
    threads = torch.get_num_threads()
    packed = torch.empty(_C.causal_conv3d_packed_size_cpu(y.shape[1], channels, kernel))
    _C.causal_conv3d_pack_cpu(weight, packed, threads)
    _C.causal_conv3d_forward_cpu(
        x, past, packed, bias, residual, y, kernel, stride, origin, threads
    )


def _new_map(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, memory_format=_LAYOUT)


def _channels_last(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous(memory_format=_LAYOUT)
