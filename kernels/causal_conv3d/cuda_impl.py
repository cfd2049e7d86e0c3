"""The causal convolution in 16 bits on Hopper: an implicit matrix product on its tensor cores.

Edges by index, phases in place, no padded and no repeated map. Forward only: gradients are the
library's.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from hunyuan_fast import _C
from hunyuan_fast.kernels.causal_conv3d import library_impl
from hunyuan_fast.kernels.causal_conv3d.by_index import Convolution, plain, upsampled
from hunyuan_fast.kernels.causal_conv3d.phases import Spans

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()
_DTYPES = (torch.bfloat16, torch.float16)
_LAYOUT = torch.channels_last_3d
_CHANNELS = 64  # of one step: kStepChannels in csrc/causal_conv3d/sm90_layout.h
_MOST_TAPS = 27
# Positions are counted in 31 bits, with room for the last tile.
_MOST_POSITIONS = 2**31 - 2**10
# Positions of a frame. A launch of its own for fewer would leave most multiprocessors idle for a
# while: tiles have 128 or 256 positions, and an H100 has 132 multiprocessors.
_WORTH_A_KERNEL = 2**16
_ONES = (1, 1, 1)

Triple = tuple[int, int, int]

backward = library_impl.backward


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> str | None:
    """None, or why the CUDA kernel cannot answer this call."""
    if scale is not None or shift is not None:
        return "the CUDA kernel takes no scale and shift: norm the map before"
    if x.dtype not in _DTYPES:
        return f"x must be bfloat16 or float16, it is {x.dtype}"
    outputs, channels = weight.shape[:2]
    if channels % _CHANNELS or outputs % _CHANNELS:
        return (
            f"channels must be multiples of {_CHANNELS}, C is {channels} and O is {outputs} in "
            f"weight"
        )
    if prod(weight.shape[2:]) > _MOST_TAPS:
        return f"weight must have at most {_MOST_TAPS} taps, its shape is {tuple(weight.shape)}"
    if not x.shape[0]:
        return f"x must have samples, its shape is {tuple(x.shape)}"
    before = 0 if past is None else past.shape[2]
    frames, *size = x.shape[2:]
    positions = x.shape[0] * (before + frames) * prod(size) * prod(factor or _ONES)
    if positions > _MOST_POSITIONS:
        return f"there must be at most {_MOST_POSITIONS} positions, there are {positions}"
    if x.device.type != "cuda":
        return f"x must be on a CUDA device, it is on {x.device}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if (major, minor) != (9, 0):
        return f"the GPU must be sm_90, it is sm_{major}{minor}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    scale: None = None,
    shift: None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (B, O, T', H', W'), channels-last."""
    convolution = _Convolution(x, weight, bias, stride, past)
    if factor is None:
        return plain(convolution, residual)
    return upsampled(convolution, factor)


class _Convolution(Convolution):
    """The inputs of one call, and memory for the kernels that are made of its weight."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Triple,
        past: Tensor | None,
    ) -> None:
        past = None if past is None else _rows(past)
        super().__init__(_rows(x), past, stride, tuple(weight.shape[2:]))
        self._weight, self._bias = weight, None if bias is None else _vector(bias)
        # launches of a stream are done in order, so each kernel in its turn takes the same memory
        size = _C.causal_conv3d_packed_size_hopper(*weight.shape[:2], self.taps)
        self._memory = weight.new_empty(size)

    def new_map(self, sizes: Iterable[int]) -> Tensor:
        """(B, O, T', H', W') for these T', H', W'."""
        shape = (self.x.shape[0], self._weight.shape[0], *sizes)
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=_LAYOUT)

    def rows(self, t: Tensor) -> Tensor:
        """t as the kernel reads it."""
        return _rows(t)

    def worth_a_kernel(self, positions: int) -> bool:
        """Whether a launch for one frame of so many positions is worth it."""
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
        taps = tuple(map(len, spans))
        packed = self._memory[: _C.causal_conv3d_packed_size_hopper(*self._weight.shape[:2], taps)]
        with torch.cuda.device(y.device):
            stream = torch.cuda.current_stream(y.device).cuda_stream
            _C.causal_conv3d_pack_hopper(self._weight, spans, packed, stream)
            _C.causal_conv3d_forward_hopper(
                self.x,
                self.past if self.has_past else None,
                packed,
                self._bias,
                None if residual is None else residual[:, :, frames],
                y,
                taps,
                self.stride,
                origin,
                stream,
            )


def _rows(t: Tensor) -> Tensor:
    """The map with its channels adjacent, every row at a multiple of 16 bytes."""
    steps = [t.stride(axis) for axis in (0, 2, 3, 4) if t.shape[axis] > 1]
    aligned = t.stride(1) == 1 and t.data_ptr() % 16 == 0 and not any(n % 8 for n in steps)
    return t if aligned else t.clone(memory_format=_LAYOUT)


def _vector(t: Tensor) -> Tensor:
    """The bias as the kernel reads it, eight values at a time."""
    aligned = t.is_contiguous() and t.data_ptr() % 16 == 0
    return t if aligned else t.clone(memory_format=torch.contiguous_format)
