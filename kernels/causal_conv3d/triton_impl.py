"""The causal convolution in Triton: implicit matrix products, forward and backward.

Upsampling launches its phases at once, over the map before it. The gradient of the map is a gather,
one launch for the inside and small ones for the edges, which stand for the padding beside them.
That of the weight is summed over chunks of positions, then over the chunks in order.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast.kernels.causal_conv3d.config import Segment, segments, splits, tile, weight_tile
from hunyuan_fast.kernels.causal_conv3d.phases import (
    begins_alone,
    phase_weights,
    phase_weights_backward,
    sum_in_time,
)
from hunyuan_fast.kernels.causal_conv3d.triton_kernels import (
    forward_kernel,
    input_gradient_kernel,
    reduce_kernel,
    weight_gradient_kernel,
)

# No GPU has run these kernels yet.
VERIFIED_ON: frozenset[str] = frozenset()

Triple = tuple[int, int, int]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONES = (1, 1, 1)
_REDUCE_BLOCK = 1024
# Positions are counted in 32 bits, with room for the tile behind the last.
_MOST_POSITIONS = 2**31 - 2**10


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    *_: object,
) -> str | None:
    """None, or why the Triton kernels cannot answer this call."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device, it is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"x must be float32, bfloat16 or float16, it is {x.dtype}"
    if not 0 < x.shape[0] < 2**16:
        return f"x must have 1 to 65535 samples, it has {x.shape[0]}"
    positions = x.shape[0] * prod(x.shape[2:]) * prod(factor or _ONES)
    if positions > _MOST_POSITIONS:
        return f"there must be at most {_MOST_POSITIONS} positions, there are {positions}"
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
    plan = _Plan.of(x, weight, stride, past, factor)
    channels = weight.shape[0]
    choice = tile(channels, x.shape[1], x.element_size(), scale is not None, _on_hopper(x))
    x = _channels_last(x)
    before = x if past is None else _channels_last(past)
    y = _new_map(x, (x.shape[0], channels, *plan.out_size))
    kernels = _matrices(plan.kernels, (0, 3, 4, 5, 2, 1), choice.columns)
    tiles_n = kernels.shape[-1] // choice.columns
    tiles_m = triton.cdiv(plan.largest_phase, choice.rows)
    beside = y if residual is None else _channels_last(residual)
    with _device_of(x):
        forward_kernel[(tiles_m * tiles_n, x.shape[0], len(plan.kernels))](
            x,
            before,
            kernels,
            kernels if bias is None else bias.contiguous(),
            kernels if scale is None else scale.contiguous(),
            kernels if shift is None else shift.contiguous(),
            beside,
            y,
            *x.shape[2:],
            *plan.out_size,
            tiles_n,
            *_steps(x),
            *_steps(before),
            *_steps(beside),
            C=x.shape[1],
            OUT=channels,
            OUT_PAD=kernels.shape[-1],
            PAST=plan.past,
            ALIGNED=_aligned(x, before),
            **plan.constants,
            HAS_BIAS=bias is not None,
            ACTIVATED=scale is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_M=choice.rows,
            BLOCK_N=choice.columns,
            BLOCK_K=choice.depth,
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
        )
    return y


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
    plan = _Plan.of(x, weight, stride, past, factor)
    dx = dweight = dbias = dpast = None
    dy = _channels_last(dy)
    with _device_of(x):
        if want_x:
            dx = _new_map(x, x.shape)
            _launch_input_gradient(dx, dy, plan, range(x.shape[2]), 0)
        if want_past:
            assert past is not None
            dpast = _new_map(past, past.shape)
            _launch_input_gradient(dpast, dy, plan, range(-plan.past, 0), plan.past)
        if want_weight:
            dkernels = _launch_weight_gradient(dy, _channels_last(x), past, plan)
            dweight = plan.weight_gradient(dkernels, weight)
        if want_bias:
            dbias = dy.sum((0, 2, 3, 4), dtype=torch.float32).to(dy.dtype)
    return dx, dweight, dbias, dpast


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A call as the kernels see it: phases, taps, and where the taps of a position begin."""

    size: Triple
    out_size: Triple
    past: int
    kernels: list[Tensor]
    stride: Triple
    leads: Triple
    factor: Triple
    continued: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        stride: Triple,
        past: Tensor | None,
        factor: Triple | None,
    ) -> "_Plan":
        if begins_alone(x, past):
            weight = sum_in_time(weight)
            stride = (1, *stride[1:])
            factor = factor and (1, *factor[1:])
        frames, height, width = x.shape[2:]
        before = 0 if past is None else past.shape[2]
        kernels = [weight]
        if factor is None:
            taps = weight.shape[2]
            lead = taps - 1 if past is None else before
            last = frames - 1 if past is None else before + frames - taps
            lengths = (last, height - 1, width - 1)
            t, h, w = (n // step + 1 for n, step in zip(lengths, stride, strict=True))
        else:
            kernels = phase_weights(weight, factor, past is not None)
            lead = kernels[0].shape[2] - 1
            t = 1 + (frames - 1) * factor[0] if past is None else frames * factor[0]
            h, w = height * factor[1], width * factor[2]
        _, _, _, rows, columns = kernels[0].shape
        return cls(
            size=(frames, height, width),
            out_size=(t, h, w),
            past=before,
            kernels=kernels,
            stride=stride,
            leads=(lead, rows // 2, columns // 2),
            factor=factor or _ONES,
            continued=past is not None,
        )

    @property
    def largest_phase(self) -> int:
        """Positions of the first phase, which none has more of, in one sample."""
        return prod(-(-n // f) for n, f in zip(self.out_size, self.factor, strict=True))

    @property
    def constants(self) -> dict[str, int]:
        """What all kernels are compiled for."""
        taps = self.kernels[0].shape[2:]
        groups = (("K", taps), ("STEP_", self.stride), ("LEAD_", self.leads), ("F", self.factor))
        named = {f"{g}{axis}": n for g, ns in groups for axis, n in zip("THW", ns, strict=True)}
        return {**named, "SHIFT_T": 0 if self.continued else 1}

    def boxes(self, frames: range) -> Iterator[tuple[Segment, Segment, Segment]]:
        """The places of [past, x] in these frames, by what of the padded map they stand for."""
        lead, rows, columns = self.leads
        first, count = -self.past, self.past + self.size[0]
        in_time = segments(first, count, max(0, lead - self.past), 0)
        sides = (segments(0, n, k, k) for n, k in zip(self.size[1:], (rows, columns), strict=True))
        for t, h, w in product(in_time, *sides):
            start, end = max(t.start, frames.start), min(t.start + t.count, frames.stop)
            if start < end:
                part = Segment(
                    start=start, count=end - start, from_offset=t.from_offset, folds=t.folds
                )
                yield part, h, w

    def weight_gradient(self, dkernels: Tensor, weight: Tensor) -> Tensor:
        """dkernels (phases, KT, KH, KW, C, O) in fp32 -> the gradient of the call's weight."""
        parts = list(dkernels.permute(0, 5, 4, 1, 2, 3))
        gradient = phase_weights_backward(parts, self.factor, self.continued).to(weight.dtype)
        repeats = weight.shape[2] // gradient.shape[2]
        return gradient.repeat_interleave(repeats, 2).contiguous()


def _launch_input_gradient(dx: Tensor, dy: Tensor, plan: _Plan, frames: range, offset: int) -> None:
    """Writes the frames of [past, x] that dx holds, from frame ``-offset`` on."""
    batch, channels = dx.shape[:2]
    choice = tile(channels, dy.shape[1], dx.element_size())
    kernels = _matrices(plan.kernels, (0, 3, 4, 5, 1, 2), choice.columns)
    tiles_n = kernels.shape[-1] // choice.columns
    for box in plan.boxes(frames):
        places = prod(segment.count for segment in box)
        input_gradient_kernel[(triton.cdiv(places, choice.rows) * tiles_n, batch)](
            dy,
            kernels,
            dx,
            *dx.shape[2:],
            *plan.out_size,
            *(segment.start for segment in box),
            *(segment.count for segment in box),
            *(segment.from_offset for segment in box),
            *(segment.folds for segment in box),
            tiles_n,
            *_steps(dy),
            C=channels,
            C_PAD=kernels.shape[-1],
            OUT=dy.shape[1],
            PAST=offset,
            EDGE=any(segment.folds > 1 for segment in box),
            **plan.constants,
            BLOCK_M=choice.rows,
            BLOCK_N=choice.columns,
            BLOCK_K=choice.depth,
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
        )


def _launch_weight_gradient(dy: Tensor, x: Tensor, past: Tensor | None, plan: _Plan) -> Tensor:
    """(phases, KT, KH, KW, C, O) in fp32."""
    batch, channels, columns = x.shape[0], x.shape[1], dy.shape[1]
    choice = weight_tile(channels, columns, x.element_size())
    tiles_n = triton.cdiv(columns, choice.columns)
    tiles = triton.cdiv(channels, choice.rows) * tiles_n
    taps = plan.kernels[0].shape[2:]
    shape = (len(plan.kernels), *taps, channels, columns)
    products = len(plan.kernels) * prod(taps)
    positions = batch * plan.largest_phase
    parts = splits(positions, tiles * products, prod(shape))
    chunk = triton.cdiv(positions, parts)
    partials = x.new_empty((parts, *shape), dtype=torch.float32)
    before = x if past is None else _channels_last(past)
    weight_gradient_kernel[(tiles, products, parts)](
        dy,
        x,
        before,
        partials,
        batch,
        *x.shape[3:],
        *plan.out_size,
        tiles_n,
        chunk,
        *_steps(dy),
        *_steps(x),
        *_steps(before),
        C=channels,
        OUT=columns,
        PAST=plan.past,
        ALIGNED=_aligned(x, before),
        **plan.constants,
        BLOCK_M=choice.rows,
        BLOCK_N=choice.columns,
        BLOCK_K=choice.depth,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
    if parts == 1:
        return partials[0]
    sums = x.new_empty(shape, dtype=torch.float32)
    grid = (triton.cdiv(sums.numel(), _REDUCE_BLOCK),)
    reduce_kernel[grid](partials, sums, parts, sums.numel(), BLOCK=_REDUCE_BLOCK, num_warps=4)
    return sums


def _matrices(kernels: list[Tensor], order: tuple[int, ...], block: int) -> Tensor:
    """The phases' kernels (phases, O, C, KT, KH, KW) in another order, the last one padded."""
    ordered = torch.stack(kernels).permute(order)
    return F.pad(ordered, (0, -ordered.shape[-1] % block)).contiguous()


def _channels_last(t: Tensor) -> Tensor:
    """The tensor with its channels adjacent in memory; the other strides may be any."""
    if t.stride(1) == 1 or t.shape[1] == 1:
        return t
    return t.contiguous(memory_format=torch.channels_last_3d)


def _steps(t: Tensor) -> tuple[int, ...]:
    """Strides of samples, frames, rows and columns."""
    return t.stride(0), *t.stride()[2:]


def _aligned(*maps: Tensor) -> bool:
    """Whether every position of the maps begins at a multiple of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(n * t.element_size() % 16 == 0 for n in _steps(t))
        for t in maps
    )


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def _new_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    layout = torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
