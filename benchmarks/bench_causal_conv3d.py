"""The VAE's convolutions at the shapes of its layers, against padding and then convolving."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Work, compiled
from benchmarks.kit.pairing import Rounds
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d

Triple = tuple[int, int, int]
_ONES = (1, 1, 1)


@dataclass(frozen=True)
class _Layer:
    """A convolution of the VAE: (T, H, W) of its input, and what it makes of it."""

    name: str
    size: Triple
    channels: int
    out_channels: int
    kernel: int = 3
    stride: Triple = _ONES
    factor: Triple | None = None

    @property
    def out_size(self) -> Triple:
        t, h, w = self.size
        if self.factor is not None:
            return 1 + (t - 1) * self.factor[0], h * self.factor[1], w * self.factor[2]
        st, sh, sw = self.stride
        return (t - 1) // st + 1, (h - 1) // sh + 1, (w - 1) // sw + 1


# Of a clip of 9 frames of 128 x 128, whose large maps exceed the caches and whose calls end in a
# second, and of an image of 256 x 256, in the decoder and the encoder.
_CPU_LAYERS = (
    _Layer("decoder-128ch", (9, 128, 128), 128, 128),
    _Layer("decoder-512ch", (5, 32, 32), 512, 512),
    _Layer("decoder-in", (3, 16, 16), 16, 512),
    _Layer("decoder-out", (9, 128, 128), 128, 3),
    _Layer("shortcut", (9, 128, 128), 256, 128, kernel=1),
    _Layer("encoder-down-space", (9, 128, 128), 128, 128, stride=(1, 2, 2)),
    _Layer("encoder-down", (9, 64, 64), 256, 256, stride=(2, 2, 2)),
    _Layer("image-256ch", (1, 128, 128), 256, 256),
)
_CPU_UPSAMPLED = (
    _Layer("decoder-up-space", (3, 16, 16), 512, 512, factor=(1, 2, 2)),
    _Layer("decoder-up", (5, 64, 64), 256, 256, factor=(2, 2, 2)),
)
# Of 129 frames of 720 x 1280, a part of the clip at full size.
_GPU_LAYERS = (
    _Layer("720p-128ch", (17, 720, 1280), 128, 128),
    _Layer("720p-256-128ch", (9, 720, 1280), 256, 128),
    _Layer("720p-512ch", (17, 180, 320), 512, 512),
    _Layer("720p-encoder-down", (17, 360, 640), 256, 256, stride=(2, 2, 2)),
    _Layer("720p-shortcut", (17, 720, 1280), 256, 128, kernel=1),
)
_GPU_UPSAMPLED = (
    _Layer("720p-up-space", (17, 90, 160), 512, 512, factor=(1, 2, 2)),
    _Layer("720p-up", (9, 360, 640), 256, 256, factor=(2, 2, 2)),
)
_NANO = (_Layer("nano", (17, 96, 96), 32, 32), _Layer("nano-image", (1, 96, 96), 32, 32))


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The layers that take most of the VAE's time, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        large = device.type == "cuda"
        size = (5, 64, 64) if large else (3, 8, 8)
        plain = _Layer("quick", size, 32, 32)
        doubled = _Layer("quick", size, 32, 32, factor=(2, 2, 2))
        return [_case(layer, dtype) for layer in (plain, doubled) for dtype in (fp32, bf16)]
    if device.type == "cuda":
        return [_case(layer, bf16) for layer in (*_GPU_LAYERS, *_GPU_UPSAMPLED)]
    # gradients are torch's, as the peers' are: two cases show them, the others are for inference
    return [
        *(_forward_only(_case(layer, fp32)) for layer in _CPU_LAYERS),
        _forward_only(_case(_CPU_UPSAMPLED[1], fp32)),
        _case(_CPU_UPSAMPLED[0], fp32),
        _forward_only(_case(_CPU_LAYERS[1], bf16)),
        *(_case(layer, fp32, cold=False) for layer in _NANO),
    ]


def _forward_only(case: Case) -> Case:
    work = {FORWARD: case.work[FORWARD]}
    return replace(case, work=work, rounds=Rounds(budget=6.0, least=5, most=20))


def _case(layer: _Layer, dtype: torch.dtype, *, cold: bool = True) -> Case:
    factor = layer.factor
    taps = (layer.kernel,) * 3
    shapes = (
        (1, layer.channels, *layer.size),
        (layer.out_channels, layer.channels, *taps),
        (layer.out_channels,),
    )
    ours: Call
    if factor is None:
        ours = partial(causal_conv3d, stride=layer.stride)
    else:
        ours = partial(upsample_causal_conv3d, factor=factor)
    plain = partial(_pad_and_convolve, stride=layer.stride, factor=factor)
    return Case(
        name=layer.name,
        function="causal_conv3d" if factor is None else "upsample_causal_conv3d",
        dtype=dtype,
        shape=dict(zip("BCTHW", shapes[0], strict=True)),
        inputs=partial(_draw, shapes, dtype),
        call=ours,
        arguments=lambda x, weight, bias: (x, weight, bias, layer.stride, None, factor),
        work=_work(layer, dtype),
        peers=(
            Peer("eager", lambda: plain),
            Peer("eager contiguous", lambda: _contiguous(plain)),
            Peer("torch.compile", compiled(plain)),
        ),
        cold=cold,
    )


def _draw(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    x, weight, bias = (torch.randn(s, generator=generator, device=generator.device) for s in shapes)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight *= prod(shapes[1][1:]) ** -0.5
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))


def _work(layer: _Layer, dtype: torch.dtype) -> dict[str, Work]:
    """Every map read or written once; of the multiplications those that no form can save.

    Of one frame the taps in time are one; along a doubled axis two taps of three are.
    """
    taps = [layer.kernel] * 3
    if layer.size[0] == 1:
        taps[0] = 1
    for axis, doubling in enumerate(layer.factor or _ONES):
        if doubling == 2 and taps[axis] == 3:
            taps[axis] = 2
    reads = layer.channels * prod(layer.size)
    writes = layer.out_channels * prod(layer.out_size)
    weight = layer.channels * layer.out_channels * layer.kernel**3
    flops = 2 * prod(taps) * layer.channels * writes
    size = dtype.itemsize
    return {
        FORWARD: Work((reads + writes + weight) * size, flops),
        # then dy, x and the weight again, and dx and dweight
        TRAINING: Work((3 * reads + 2 * writes + 3 * weight) * size, 3 * flops),
    }


def _pad_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: Triple, factor: Triple | None
) -> Tensor:
    """As it is usually written: a repeated map, a padded copy of it, a convolution."""
    if factor is not None:
        t, h, w = factor
        space = x.repeat_interleave(h, 3).repeat_interleave(w, 4)
        x = torch.cat((space[:, :, :1], space[:, :, 1:].repeat_interleave(t, 2)), 2)
    side, lead = weight.shape[-1] // 2, weight.shape[2] - 1
    padded = F.pad(x, (side, side, side, side, lead, 0), mode="replicate")
    return F.conv3d(padded, weight, bias, stride)


def _contiguous(call: Callable[..., Tensor]) -> Call:
    """The same in torch's usual layout; its inputs and results are copied there and back."""

    def contiguous(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = call(x.contiguous(), weight, bias)
        return y.contiguous(memory_format=torch.channels_last_3d)

    return contiguous
