"""The causal convolution in fp32 by the C++ kernel: edges by index, phases in place, no padded map.

Forward only: gradients are the library's.
"""

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.causal_conv3d import library_impl
from hunyuan_fast.kernels.causal_conv3d.phases import Spans, begins_alone, each_tap, phase_spans

VERIFIED_ON = frozenset({"cpu"})
FUSES_NORM = True
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
    if factor is None:
        fused = (None, None) if scale is None or shift is None else (scale, shift)
        return _plain(_Convolution(x, weight, bias, stride, past, *fused), residual)
    return _upsampled(_Convolution(x, weight, bias, stride, past), factor)


def _plain(convolution: "_Convolution", residual: Tensor | None) -> Tensor:
    x, past, stride = convolution.x, convolution.past, convolution.stride
    taps, rows, columns = convolution.taps
    lead = taps - 1 if past is None else past.shape[2]
    lengths = (x.shape[2] + lead - taps + 1, *x.shape[3:])
    y = convolution.new_map((n - 1) // step + 1 for n, step in zip(lengths, stride, strict=True))
    spans = tuple(map(each_tap, convolution.taps))
    residual = None if residual is None else _channels_last(residual)
    convolution.run(spans, (lead, rows // 2, columns // 2), y, residual)
    return y


def _upsampled(convolution: "_Convolution", factor: Triple) -> Tensor:
    """Every output parity is a convolution of x that writes its own places of the result."""
    x, continued, (t, h, w) = convolution.x, convolution.past is not None, factor
    frames, height, width = x.shape[2:]
    if begins_alone(x, convolution.past):  # and has one frame: there is nothing to double in time
        t = 1
    length = frames * t if continued else 1 + (frames - 1) * t
    y = convolution.new_map((length, height * h, width * w))
    phases = phase_spans(convolution.taps, (t, h, w))
    for parity, spans in zip(product(range(t), range(h), range(w)), phases, strict=True):
        # a doubled frame that continues a clip gives the odd output first
        place = (t - 1 - parity[0] if continued else parity[0], *parity[1:])
        places = tuple(slice(p, None, f) for p, f in zip(place, (t, h, w), strict=True))
        lead = len(spans[0]) - 1 - (0 if continued else parity[0])
        convolution.run(spans, (lead, 1 - parity[1], 1 - parity[2]), y[(..., *places)])
    return y


class _Convolution:
    """The inputs of one call, and memory for the kernels that are made of its weight."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Triple,
        past: Tensor | None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self.x, self.past = _channels_last(x), None if past is None else _channels_last(past)
        self.stride, self.taps = stride, tuple(weight.shape[2:])
        self._weight, self._bias = weight, None if bias is None else bias.contiguous()
        self._norm = tuple(None if v is None else v.contiguous() for v in (scale, shift))
        # each kernel in its turn takes the same memory, which stays in the caches
        self._memory = torch.empty(_C.causal_conv3d_packed_size_cpu(*weight.shape[:2], self.taps))

    def new_map(self, sizes: Iterable[int]) -> Tensor:
        """(B, O, T', H', W') for these T', H', W'."""
        shape = (self.x.shape[0], self._weight.shape[0], *sizes)
        y = torch.empty(shape, memory_format=_LAYOUT)
        _C.causal_conv3d_prefer_huge_pages(y.movedim(1, -1))  # all of it, while nobody has written
        return y

    def run(
        self, spans: tuple[Spans, ...], origin: Triple, y: Tensor, residual: Tensor | None = None
    ) -> None:
        """y(o) = sum over taps k of kernel(k) x(o * stride + k - origin); y may have any strides.

        spans: the taps of the weight that each tap of the kernel adds up, by axis.

        At the beginning of a clip some taps in time read the same frame, the first. They are added
        up: a third of the multiplications for the first frame, two thirds for the second. Each
        needs a kernel of its own, which pays for itself where frames are large or there are no
        others.
        """
        (lead, *sides), (times, *areas) = origin, spans
        step, begun = self.stride[0], 0
        alone = y.shape[2] * step <= lead
        if not self._has_past and (alone or y[0, 0, 0].numel() >= _WORTH_A_KERNEL):
            begun = min(y.shape[2], -(-lead // step))
        for index in range(begun):
            alike = min(lead - index * step + 1, len(times))
            merged = ((times[0][0], times[alike - 1][1]), *times[alike:])
            self._convolve((merged, *areas), (0, *sides), y, residual, slice(index, index + 1))
        self._convolve(spans, (lead - begun * step, *sides), y, residual, slice(begun, None))

    @property
    def _has_past(self) -> bool:
        return self.past is not None and self.past.shape[2] > 0

    def _convolve(
        self,
        spans: tuple[Spans, ...],
        origin: tuple[int, ...],
        y: Tensor,
        residual: Tensor | None,
        frames: slice,
    ) -> None:
        """Those frames of y, with the origin of the first of them."""
        y = y[:, :, frames]
        if not y.numel():
            return
        residual = None if residual is None else residual[:, :, frames]
        past, threads = self.past if self._has_past else None, torch.get_num_threads()
        packed, taps = self._packed(spans), tuple(map(len, spans))
        _C.causal_conv3d_forward_cpu(
            self.x,
            past,
            packed,
            self._bias,
            *self._norm,
            residual,
            y,
            taps,
            self.stride,
            origin,
            threads,
        )

    def _packed(self, spans: tuple[Spans, ...]) -> Tensor:
        """The kernel with a tap for each span of each axis, in the order that C++ reads."""
        shape = self._weight.shape[:2]
        packed = self._memory[: _C.causal_conv3d_packed_size_cpu(*shape, tuple(map(len, spans)))]
        _C.causal_conv3d_pack_cpu(self._weight, spans, packed, torch.get_num_threads())
        return packed


def _channels_last(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous(memory_format=_LAYOUT)
