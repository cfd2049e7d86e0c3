"""GELU alone, and written behind the attention output, against the ways that others write it."""

from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Call, Case, Peer, Unavailable, Work, compiled
from hunyuan_fast.ops import concat_gelu_tanh, gelu_tanh

_MLP_RATIO = 4


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The networks of a double and of a single block, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    wide = shapes.HIDDEN_SIZE
    if quick:
        length = 4096 if device.type == "cuda" else 256
        return [_case("quick", length, wide, dtype) for dtype in (fp32, bf16)]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_720P_129)
        return [build(clip.name, clip.joint, wide, bf16) for clip in clips for build in _BUILDERS]
    clip, nano = shapes.CLIP_256P_33, shapes.NANO
    return [
        *(_case(clip.name, clip.video, wide, dtype, alternating=True) for dtype in (fp32, bf16)),
        *(_concat_case(clip.name, clip.video, wide, dtype) for dtype in (fp32, bf16)),
        *(
            build(nano.name, nano.video, shapes.NANO_HIDDEN_SIZE, fp32, cold=False)
            for build in _BUILDERS
        ),
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
    shape = (1, length, _MLP_RATIO * width)
    tensor = length * _MLP_RATIO * width * dtype.itemsize
    eager = partial(F.gelu, approximate="tanh")
    return Case(
        name=name,
        function="gelu_tanh",
        dtype=dtype,
        shape=dict(zip("BLM", shape, strict=True)),
        inputs=partial(_draw, (shape,), dtype),
        call=gelu_tanh,
        arguments=lambda x: (x,),
        # x and y; then x and dy, and dx
        work={FORWARD: Work(2 * tensor), TRAINING: Work(5 * tensor)},
        peers=(
            Peer("eager", lambda: eager),
            Peer("torch.compile", compiled(lambda x: F.gelu(x, approximate="tanh"))),
            Peer("liger", partial(_liger, shape, dtype)),
        ),
        cold=cold,
        alternating=alternating,
    )


def _concat_case(
    name: str, length: int, width: int, dtype: torch.dtype, *, cold: bool = True
) -> Case:
    sizes = ((1, length, width), (1, length, _MLP_RATIO * width))
    left, right = (length * s[-1] * dtype.itemsize for s in sizes)
    return Case(
        name=name,
        function="concat_gelu_tanh",
        dtype=dtype,
        shape={"B": 1, "L": length, "E": width, "M": _MLP_RATIO * width},
        inputs=partial(_draw, sizes, dtype),
        call=concat_gelu_tanh,
        arguments=lambda left, x: (x, left),
        # left, x and y; then x, its part of dy, and dx: the gradient of left is the other part
        work={FORWARD: Work(2 * (left + right)), TRAINING: Work(2 * left + 5 * right)},
        peers=(
            Peer("eager", lambda: _eager_concat),
            Peer("torch.compile", compiled(_eager_concat)),
        ),
        cold=cold,
    )


_BUILDERS = (_case, _concat_case)


def _draw(
    sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    drawn = (torch.randn(s, generator=generator, device=generator.device) for s in sizes)
    return tuple(t.to(dtype).requires_grad_() for t in drawn)


def _eager_concat(left: Tensor, x: Tensor) -> Tensor:
    return torch.cat((left, F.gelu(x, approximate="tanh")), dim=-1)


def _liger(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    """Their gated form with a gate of ones, for want of another: one more tensor each way."""
    if find_spec("liger_kernel") is None:
        raise Unavailable("liger_kernel is not installed")
    if not torch.cuda.is_available():
        raise Unavailable("liger_kernel needs a GPU")
    multiply = import_module("liger_kernel.ops.geglu").LigerGELUMulFunction
    ones = torch.ones(shape, dtype=dtype, device="cuda")

    def call(x: Tensor) -> Tensor:
        result: Tensor = multiply.apply(x, ones)
        return result

    return call
