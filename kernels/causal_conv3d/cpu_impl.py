"""The causal convolution in fp32 by the C++ kernel: edges by index, phases in place, no padded map.

Forward only: gradients are the library's.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.causal_conv3d import library_impl
from hunyuan_fast.kernels.causal_conv3d.by_index import Convolution, plain, upsampled
from hunyuan_fast.kernels.causal_conv3d.phases import Spans

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
        return plain(_Convolution(x, weight, bias, stride, past, *fused), residual)
    return upsampled(_Convolution(x, weight, bias, stride, past), factor)


class _Convolution(Convolution):
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
        past = None if past is None else _channels_last(past)
        super().__init__(_channels_last(x), past, stride, tuple(weight.shape[2:]))
        self._weight, self._bias = weight, None if bias is None else bias.contiguous()
        self._norm = tuple(None if v is None else v.contiguous() for v in (scale, shift))
        # each kernel in its turn takes the same memory, which stays in the caches
        self._memory = torch.empty(_C.causal_conv3d_packed_size_cpu(*weight.shape[:2], self.taps))

    def new_map(self, sizes: Iterable[int]) -> Tensor:
        """(B, O, T', H', W') for these T', H', W'."""
        shape = (self.x.shape[0], self._weight.shape[0], *sizes)
        return torch.empty(shape, memory_format=_LAYOUT)

    def rows(self, t: Tensor) -> Tensor:
        """t as the kernel reads it."""
        return _channels_last(t)

    def worth_a_kernel(self, positions: int) -> bool:
        """Whether a kernel for one frame of so many positions pays for itself."""
        return positions >= _WORTH_A_KERNEL

    def convolve(
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
        past, threads = self.past if self.has_past else None, torch.get_num_threads()
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
