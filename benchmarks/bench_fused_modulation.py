"""Layer norm and modulation against the ways that other models write it."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Unavailable, Work, compiled
from hunyuan_fast.ops import layer_norm_modulate

_EPS = 1e-6


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The video stream of a block, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    wide = shapes.HIDDEN_SIZE
    if quick:
        length = 4096 if device.type == "cuda" else 256
        return [_case("quick", length, wide, dtype, alternating=True) for dtype in (fp32, bf16)]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_720P_129)
        return [_case(clip.name, clip.joint, wide, bf16) for clip in clips]
    clip, nano = shapes.CLIP_256P_33, shapes.NANO
    large = [_case(clip.name, clip.video, wide, d, alternating=True) for d in (fp32, bf16)]
    return [*large, _case(nano.name, nano.video, shapes.NANO_HIDDEN_SIZE, fp32, cold=False)]


def _case(
    name: str,
    length: int,
    width: int,
    dtype: torch.dtype,
    *,
    cold: bool = True,
    alternating: bool = False,
) -> Case:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = ((1, length, width), (1, width), (1, width))
        drawn = (torch.randn(s, generator=generator, device=generator.device) for s in sizes)
        return tuple(t.to(dtype).requires_grad_() for t in drawn)

    tensor, vector = (n * dtype.itemsize for n in (length * width, width))
    return Case(
        name=name,
        function="layer_norm_modulate",
        dtype=dtype,
        shape={"B": 1, "L": length, "E": width},
        inputs=inputs,
        call=_ours,
        arguments=lambda x, shift, scale: (x, shift, scale, _EPS),
        work={
            # x and y; then x and dy, and dx, with a vector and its gradient for each of two.
            FORWARD: Work(2 * tensor + 2 * vector),
            TRAINING: Work(5 * tensor + 5 * vector),
        },
        peers=(
            Peer("eager", lambda: _eager),
            Peer("torch.compile", compiled(_eager)),
            Peer("diffusers", lambda: _diffusers(width)),
            Peer("liger", lambda: _liger(width, dtype)),
        ),
        cold=cold,
        alternating=alternating,
    )


def _ours(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm_modulate(x, shift, scale, eps=_EPS)


def _eager(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=_EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


def _diffusers(width: int) -> Call:
    """Their module, without the projection that makes the vectors."""
    if find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed")
    module = import_module("diffusers.models.normalization").AdaLayerNormContinuous(
        width, width, elementwise_affine=False, eps=_EPS
    )
    module.silu = module.linear = torch.nn.Identity()

    def call(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = module(x, torch.cat((scale, shift), dim=1))
        return result

    return call


def _liger(width: int, dtype: torch.dtype) -> Call:
    """Their layer norm, which has weights and no modulation, then the modulation in torch."""
    if find_spec("liger_kernel") is None:
        raise Unavailable("liger_kernel is not installed")
    if not torch.cuda.is_available():
        raise Unavailable("liger_kernel needs a GPU")
    layer_norm = import_module("liger_kernel.transformers.functional").liger_layer_norm
    weight = torch.ones(width, dtype=dtype, device="cuda")
    bias = torch.zeros_like(weight)

    def call(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed: Tensor = layer_norm(x, weight, bias, _EPS)
        return normed * (1 + scale[:, None]) + shift[:, None]

    return call
