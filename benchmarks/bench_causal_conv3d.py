"""The VAE's convolutions at the shapes of its layers, against padding and then convolving.

On a GPU every kind of layer that 720p and 480p meet, in chunks as within 80 GB, against cuDNN in
both layouts: padding in the call or before it, algorithms by cuDNN's rules or by trial.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Work, compiled
from benchmarks.kit.pairing import Rounds
from benchmarks.vae_flops import frames_seen
from benchmarks.vae_layers import Convolution, Triple, convolutions
from hunyuan_fast.kernels.causal_conv3d.library_impl import Margins, padded_channels_last
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d

_ONES = (1, 1, 1)


# Of a clip of 9 frames of 128 x 128, whose large maps exceed the caches and whose calls end in a
# second, and of an image of 256 x 256, in the decoder and the encoder.
_CPU_LAYERS = (
    Convolution("decoder-128ch", (9, 128, 128), 128, 128),
    Convolution("decoder-512ch", (5, 32, 32), 512, 512),
    Convolution("decoder-in", (3, 16, 16), 16, 512),
    Convolution("decoder-out", (9, 128, 128), 128, 3),
    Convolution("shortcut", (9, 128, 128), 256, 128, kernel=1),
    Convolution("encoder-down-space", (9, 128, 128), 128, 128, stride=(1, 2, 2)),
    Convolution("encoder-down", (9, 64, 64), 256, 256, stride=(2, 2, 2)),
    Convolution("image-256ch", (1, 128, 128), 256, 256),
)
_CPU_UPSAMPLED = (
    Convolution("decoder-up-space", (3, 16, 16), 512, 512, factor=(1, 2, 2)),
    Convolution("decoder-up", (5, 64, 64), 256, 256, factor=(2, 2, 2)),
)
# On a GPU, forward and backward.
_GPU_TRAINED = (
    Convolution("trained-256ch", (5, 180, 320), 256, 256),
    Convolution("trained-256ch", (5, 90, 160), 256, 256, factor=(2, 2, 2)),
)
# A call is some milliseconds, and a table has dozens of layers.
_GPU_ROUNDS = Rounds(budget=3.0, least=3, most=20)
# Channels, frames, rows and columns of the convolution that shows what the machine can do.
_PROBE = (256, 9, 66, 66)
_NANO = (Convolution("nano", (17, 96, 96), 32, 32), Convolution("nano-image", (1, 96, 96), 32, 32))


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The layers that take most of the VAE's time, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        large = device.type == "cuda"
        size = (5, 64, 64) if large else (3, 8, 8)
        plain = Convolution("quick", size, 32, 32)
        doubled = Convolution("quick", size, 32, 32, factor=(2, 2, 2))
        return [_case(layer, dtype) for layer in (plain, doubled) for dtype in (fp32, bf16)]
    if device.type == "cuda":
        return [*_gpu_cases(), *(_case(layer, bf16) for layer in _GPU_TRAINED)]
    # gradients are torch's, as the peers' are: two cases show them, the others are for inference
    measured = [
        *(_forward_only(_case(layer, fp32)) for layer in _CPU_LAYERS),
        _forward_only(_case(_CPU_UPSAMPLED[1], fp32)),
        _case(_CPU_UPSAMPLED[0], fp32),
        _forward_only(_case(_CPU_LAYERS[1], bf16)),
        *(_case(layer, fp32, cold=False) for layer in _NANO),
    ]
    return [replace(case, conv3d=_PROBE) for case in measured]


def _gpu_cases() -> list[Case]:
    """In bf16 all layers, in fp16 those of the larger clip that keep the number of channels."""
    large, small = (
        convolutions(VAEConfig(), clip, label)
        for clip, label in ((shapes.PIXELS_720P_129, "720p"), (shapes.PIXELS_480P_65, "480p"))
    )
    half = [each for each in large if each.channels == each.out_channels]
    pairs = [(torch.bfloat16, [*large, *small]), (torch.float16, half)]
    return [_gpu_case(layer, dtype) for dtype, layers in pairs for layer in layers]


def _gpu_case(layer: Convolution, dtype: torch.dtype) -> Case:
    case = _case(layer, dtype)
    layouts = (("channels-last", torch.channels_last_3d), ("contiguous", torch.contiguous_format))
    trying = partial(torch.backends.cudnn.flags, enabled=True, benchmark=True)
    peers = [
        Peer(
            f"cuDNN {name}{', padded before' if before else ''}{how}",
            partial(_cudnn, layer, layout, padded_before=before),
            context,
        )
        for name, layout in layouts
        for before in (False, True)
        for how, context in (("", nullcontext), (", by trial", trying))
    ]
    work = {FORWARD: case.work[FORWARD]}
    return replace(case, work=work, rounds=_GPU_ROUNDS, peers=(case.peers[0], *peers))


def _cudnn(layer: Convolution, layout: torch.memory_format, *, padded_before: bool) -> Call:
    """The convolution of a padded map, which is all that is timed if it was padded before.

    Maps and weights have the layout to begin with: they are brought into it once.
    """
    prepared: dict[int, tuple[Tensor, Tensor]] = {}

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.data_ptr() not in prepared:
            own = x.contiguous(memory_format=layout)
            clip = _padded(own, layer, layout) if padded_before else own
            prepared[x.data_ptr()] = clip, weight.contiguous(memory_format=layout)
        clip, kernel = prepared[x.data_ptr()]
        padded = clip if padded_before else _padded(clip, layer, layout)
        return F.conv3d(padded, kernel, bias, layer.stride)

    return call


def _padded(x: Tensor, layer: Convolution, layout: torch.memory_format) -> Tensor:
    """Repeated where the layer doubles, with its margins, in the layout of x."""
    x = _repeated(x, layer.factor)
    side, lead = layer.kernel // 2, layer.kernel - 1
    if layout == torch.channels_last_3d:
        return padded_channels_last(x, None, Margins(lead, side, side))
    return F.pad(x, (side, side, side, side, lead, 0), mode="replicate")


def _forward_only(case: Case) -> Case:
    work = {FORWARD: case.work[FORWARD]}
    return replace(case, work=work, rounds=Rounds(budget=6.0, least=5, most=20))


def _case(layer: Convolution, dtype: torch.dtype, *, cold: bool = True) -> Case:
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


def _work(layer: Convolution, dtype: torch.dtype) -> dict[str, Work]:
    """Every map read or written once; of the multiplications those that no form can save.

    Along a doubled axis two taps of three are one, and so are those that meet the first frame.
    """
    factor, frames = layer.factor or _ONES, layer.out_size[0]
    taps = frames_seen(frames, layer.kernel, stride=layer.stride[0], factor=factor[0])
    for doubling in factor[1:]:
        taps *= 2 if doubling == 2 and layer.kernel == 3 else layer.kernel
    reads = layer.channels * prod(layer.size)
    writes = layer.out_channels * prod(layer.out_size)
    weight = layer.channels * layer.out_channels * layer.kernel**3
    flops = 2 * taps * layer.channels * writes // frames
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
    x = _repeated(x, factor)
    side, lead = weight.shape[-1] // 2, weight.shape[2] - 1
    padded = F.pad(x, (side, side, side, side, lead, 0), mode="replicate")
    return F.conv3d(padded, weight, bias, stride)


def _repeated(x: Tensor, factor: Triple | None) -> Tensor:
    if factor is None:
        return x
    t, h, w = factor
    space = x.repeat_interleave(h, 3).repeat_interleave(w, 4)
    return torch.cat((space[:, :, :1], space[:, :, 1:].repeat_interleave(t, 2)), 2)


def _contiguous(call: Callable[..., Tensor]) -> Call:
    """The same in torch's usual layout; its inputs and results are copied there and back."""

    def contiguous(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = call(x.contiguous(), weight, bias)
        return y.contiguous(memory_format=torch.channels_last_3d)

    return contiguous
