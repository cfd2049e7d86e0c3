"""The causal convolution: every tile, stride and phase, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor

from hunyuan_fast.kernels.causal_conv3d import reference
from tests.sanitize_cases import stands
from tests.sanitize_cases.case import HALF, WIDE, Arguments, Case, interpreted, normal

ROOM = "causal_conv3d"
LAYOUT = torch.channels_last_3d
ONES = (1, 1, 1)
# a wrong product shows at once; sums of taps are rounded once more than results
BOUND = 0.02


def _draw(
    generator: Generator,
    *,
    channels: int,
    outputs: int,
    size: tuple[int, int, int] = (3, 6, 7),
    batch: int = 1,
    taps: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = ONES,
    past: int | None = None,
    factor: tuple[int, int, int] | None = None,
    activated: bool = False,
    residual: bool = False,
    dtype: torch.dtype = HALF,
) -> Arguments:
    """x, weight, bias, stride, past, factor, and what forward may add."""

    def map_of(frames: int) -> Tensor:
        shape = (batch, channels, frames, *size[1:])
        return normal(generator, *shape, dtype=dtype).contiguous(memory_format=LAYOUT)

    shape = (outputs, channels, *taps)
    weight = (torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5).to(dtype)
    bias = normal(generator, outputs, dtype=dtype)
    plain = (
        *(map_of(size[0]), weight, bias, stride),
        *(None if past is None else map_of(past), factor),
    )
    if not activated and not residual:
        return plain
    lines = [normal(generator, batch, channels, dtype=WIDE) for _ in range(2)]
    beside = None
    if residual:
        result = reference.forward(*plain)
        beside = normal(generator, *result.shape, dtype=dtype).contiguous(memory_format=LAYOUT)
    return *plain, *(lines if activated else (None, None)), beside


def _draw_backward(generator: Generator, **options: Any) -> Arguments:
    x, weight, bias, stride, past, factor = _draw(generator, **options)
    y = reference.forward(x, weight, bias, stride, past, factor)
    dy = normal(generator, *y.shape, dtype=x.dtype)
    return dy, x, weight, stride, past, factor, (True, True, True, past is not None)


FORWARD: Mapping[str, dict[str, Any]] = {
    "128 outputs": {"channels": 64, "outputs": 128, "batch": 2},
    "256 outputs": {"channels": 64, "outputs": 256},
    "320 outputs, a tile in part": {"channels": 64, "outputs": 320, "size": (1, 5, 5)},
    "one tap": {"channels": 64, "outputs": 64, "taps": ONES},
    "continued": {"channels": 64, "outputs": 64, "past": 2},
    "strided": {"channels": 64, "outputs": 64, "stride": (2, 2, 2), "size": (3, 7, 8)},
    "strided, continued": {
        "channels": 64,
        "outputs": 64,
        "stride": (1, 2, 2),
        "past": 2,
        "size": (2, 6, 8),
    },
    "doubled": {"channels": 64, "outputs": 64, "factor": (2, 2, 2), "size": (2, 4, 5)},
    "doubled in space": {"channels": 64, "outputs": 64, "factor": (1, 2, 2), "size": (1, 4, 5)},
    "doubled, continued": {
        "channels": 64,
        "outputs": 64,
        "factor": (2, 2, 2),
        "past": 1,
        "size": (1, 4, 5),
    },
    "residual": {"channels": 64, "outputs": 64, "residual": True},
}
# what the CUDA kernel leaves to others
TRITON_FORWARD: Mapping[str, dict[str, Any]] = {
    "a pixel": {"channels": 24, "outputs": 3},
    "from a pixel": {"channels": 3, "outputs": 40},
    "activated": {"channels": 64, "outputs": 128, "activated": True},
    "activated, residual": {"channels": 20, "outputs": 20, "activated": True, "residual": True},
    "fp32": {"channels": 20, "outputs": 36, "dtype": WIDE},
}
# a chunk has 512 positions at least, and only several are summed by a kernel of their own
BACKWARD: Mapping[str, dict[str, Any]] = {
    "wide": {"channels": 64, "outputs": 128, "size": (1, 2, 3), "taps": (1, 3, 3)},
    "in several chunks": {"channels": 16, "outputs": 16, "size": (3, 18, 20), "taps": ONES},
    "continued": {"channels": 16, "outputs": 16, "past": 2, "size": (1, 2, 3)},
    "strided": {"channels": 16, "outputs": 16, "stride": (2, 2, 2), "size": (3, 3, 2)},
    "doubled": {"channels": 16, "outputs": 16, "factor": (2, 2, 2), "size": (1, 1, 2), "past": 1},
    "fp32": {"channels": 12, "outputs": 20, "size": (2, 2, 2), "taps": (3, 1, 3), "dtype": WIDE},
}
SLOW = ("continued", "strided", "doubled", "wide")


def _case(impl: str, what: str, options: Mapping[str, Any], **more: Any) -> Case:
    return Case(
        room=ROOM,
        impl=impl,
        what=what,
        make=partial(_draw_backward if more.get("part") == "backward" else _draw, **options),
        bound=BOUND,
        **more,
    )


# the interpreter takes the tiles that Hopper gets
ON_HOPPER = interpreted(_on_hopper=lambda _: True)
CASES = [
    *(
        _case("triton_impl", f"forward, {what}", options, here=ON_HOPPER)
        for what, options in (FORWARD | TRITON_FORWARD).items()
    ),
    *(
        _case(
            *("triton_impl", f"backward, {what}", options),
            part="backward",
            here=ON_HOPPER,
            slow=what in SLOW,
        )
        for what, options in BACKWARD.items()
    ),
    *(
        _case("cuda_impl", f"forward, {what}", options, here=stands.CONVOLUTION)
        for what, options in FORWARD.items()
    ),
    # the first frames of a clip by kernels of their own, whose taps in time are added up
    _case(
        "cuda_impl",
        "forward, first frames apart",
        {"channels": 64, "outputs": 128},
        here=stands.CONVOLUTION,
        set={"_WORTH_A_KERNEL": 1},
    ),
    # the emulator has bf16 alone
    _case(
        "cuda_impl",
        "forward, fp16",
        {"channels": 128, "outputs": 64, "dtype": torch.float16},
    ),
]
