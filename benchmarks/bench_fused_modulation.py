"""Adaptive layer norm and gated residual sum against the ways that other models write them."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Unavailable, Work, compiled
from hunyuan_fast.ops import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
)

_EPS = 1e-6
Pair = tuple[Tensor, Tensor]


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The video stream of a block, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    wide = shapes.HIDDEN_SIZE
    makers = (_case, _gate_case, _both_case)
    if quick:
        length = 4096 if device.type == "cuda" else 256
        sizes = [("quick", length, wide, dtype) for dtype in (fp32, bf16)]
        return [make(*size, alternating=True) for make in makers for size in sizes]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_720P_129)
        return [make(clip.name, clip.joint, wide, bf16) for make in makers for clip in clips]
    clip, nano = shapes.CLIP_256P_33, shapes.NANO
    sizes = [(clip.name, clip.video, wide, dtype) for dtype in (fp32, bf16)]
    small = (nano.name, nano.video, shapes.NANO_HIDDEN_SIZE, fp32)
    return [
        case
        for make in makers
        for case in (*(make(*size, alternating=True) for size in sizes), make(*small, cold=False))
    ]


def _case(
    name: str,
    length: int,
    width: int,
    dtype: torch.dtype,
    *,
    cold: bool = True,
    alternating: bool = False,
) -> Case:
    return Case(
        name=name,
        function="layer_norm_modulate",
        dtype=dtype,
        shape={"B": 1, "L": length, "E": width},
        inputs=_inputs(1, 2, length, width, dtype),
        call=_ours,
        arguments=lambda x, shift, scale: (x, shift, scale, _EPS),
        # x and modulated; then x and its gradient, dx, with a vector and its gradient for each of
        # two.
        work=_work(length, width, dtype, forward=(2, 2), backward=(3, 3)),
        peers=(
            Peer("eager", lambda: _eager),
            Peer("torch.compile", compiled(_eager)),
            Peer("diffusers", lambda: _diffusers(width)),
            Peer("liger", lambda: _liger(width, dtype)),
        ),
        cold=cold,
        alternating=alternating,
    )


def _gate_case(
    name: str,
    length: int,
    width: int,
    dtype: torch.dtype,
    *,
    cold: bool = True,
    alternating: bool = False,
) -> Case:
    return Case(
        name=name,
        function="gate_residual",
        dtype=dtype,
        shape={"B": 1, "L": length, "E": width},
        inputs=_inputs(2, 1, length, width, dtype),
        call=gate_residual,
        arguments=lambda x, y, gate: (x, None, None, _EPS, y, gate),
        # x, y and their sum; then its gradient, which is dx, y and dy.
        work=_work(length, width, dtype, forward=(3, 1), backward=(3, 2)),
        peers=(
            Peer("eager", lambda: _eager_gate),
            Peer("addcmul", lambda: _addcmul_gate),
            Peer("torch.compile", compiled(_eager_gate)),
        ),
        cold=cold,
        alternating=alternating,
    )


def _both_case(
    name: str,
    length: int,
    width: int,
    dtype: torch.dtype,
    *,
    cold: bool = True,
    alternating: bool = False,
) -> Case:
    return Case(
        name=name,
        function="gate_residual_layer_norm_modulate",
        dtype=dtype,
        shape={"B": 1, "L": length, "E": width},
        inputs=_inputs(2, 3, length, width, dtype),
        call=_as_one(_ours_both),
        arguments=lambda x, y, gate, shift, scale: (x, shift, scale, _EPS, y, gate),
        # x, y and both results; then both gradients, the residual, y, dx and dy.
        work=_work(length, width, dtype, forward=(4, 3), backward=(6, 5)),
        peers=(
            Peer("eager", lambda: _as_one(_eager_both)),
            Peer("torch.compile", lambda: _as_one(compiled(_eager_both)())),
            Peer("diffusers", lambda: _as_one(_diffusers_both(width))),
            Peer("liger", lambda: _as_one(_liger_both(width, dtype))),
        ),
        cold=cold,
        alternating=alternating,
    )


def _inputs(
    num_rows: int, num_vectors: int, length: int, width: int, dtype: torch.dtype
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = num_rows * [(1, length, width)] + num_vectors * [(1, width)]
        drawn = (torch.randn(s, generator=generator, device=generator.device) for s in sizes)
        return tuple(t.to(dtype).requires_grad_() for t in drawn)

    return inputs


def _work(
    length: int,
    width: int,
    dtype: torch.dtype,
    *,
    forward: tuple[int, int],
    backward: tuple[int, int],
) -> dict[str, Work]:
    """Bytes of (rows, vectors) that each pass moves; training is both passes."""
    row, vector = (n * dtype.itemsize for n in (length * width, width))
    both = [sum(pair) for pair in zip(forward, backward, strict=True)]
    return {
        FORWARD: Work(forward[0] * row + forward[1] * vector),
        TRAINING: Work(both[0] * row + both[1] * vector),
    }


class _Joined(torch.autograd.Function):
    """Stands for both results by the second, at no cost; its gradient goes to both."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, modulated: Tensor) -> Tensor:
        return modulated.view_as(modulated)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Pair:
        return gradient, gradient


def _as_one(call: Callable[..., Pair]) -> Call:
    """A call with two results as measurements take it, with one. Both are made all the same."""

    def one(*tensors: Tensor) -> Tensor:
        results = call(*tensors)
        if not torch.is_grad_enabled():
            return results[1]
        joined: Tensor = _Joined.apply(*results)
        return joined

    return one


def _ours(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm_modulate(x, shift, scale, eps=_EPS)


def _ours_both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Pair:
    return gate_residual_layer_norm_modulate(x, y, gate, shift, scale, eps=_EPS)


def _eager_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _addcmul_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, y, gate[:, None])


def _eager_both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Pair:
    residual = _eager_gate(x, y, gate)
    return residual, _eager(residual, shift, scale)


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


def _diffusers_both(width: int) -> Callable[..., Pair]:
    modulate = _diffusers(width)

    def call(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Pair:
        residual = _eager_gate(x, y, gate)
        return residual, modulate(residual, shift, scale)

    return call


def _liger_both(width: int, dtype: torch.dtype) -> Callable[..., Pair]:
    modulate = _liger(width, dtype)

    def call(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Pair:
        residual = _eager_gate(x, y, gate)
        return residual, modulate(residual, shift, scale)

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
