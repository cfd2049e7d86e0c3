"""Calls of the causal convolutions, their truth by definition, and when a result is right."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d
from tests.kit.numerics import assert_as_good_as

ROOM = "causal_conv3d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONES = (1, 1, 1)
STRIDES = (ONES, (1, 2, 2), (2, 2, 2))
FACTORS = ((1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 2), ONES)
RESULTS = ("y", "dx", "dweight", "dbias", "dpast")
# Where there is a GPU, Triton compiles its kernels and refuses tensors on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU_ONLY = {"cuda_impl"} if INTERPRETED else {"cuda_impl", "triton_impl"}
ON_CPU = tuple(n for n in implementations(ROOM) if n not in ON_GPU_ONLY)
QUICK = tuple(n for n in ON_CPU if n != "triton_impl")

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Call:
    """Everything that a call takes, and the gradient of its result."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    past: Tensor | None
    dy: Tensor
    stride: Triple = ONES
    factor: Triple | None = None

    @property
    def leaves(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.bias, self.past]

    @property
    def arguments(self) -> tuple[object, ...]:
        """As the room takes them."""
        return self.x, self.weight, self.bias, self.stride, self.past, self.factor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        names = ("x", "weight", "bias", "past", "dy")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t if t is None else change(t) for n, t in tensors.items()})


def draw_call(
    generator: torch.Generator,
    *,
    shape: tuple[int, ...] = (2, 3, 4, 5, 6),
    channels: int = 4,
    kernel: int | Triple = 3,
    stride: Triple = ONES,
    factor: Triple | None = None,
    past: int | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """shape: of x. channels: of the result. past: its number of frames."""
    batch, width, frames, *size = shape
    taps = (kernel,) * 3 if isinstance(kernel, int) else kernel
    t, h, w = factor or stride
    if factor is None:
        length = (frames - 1 if past is None else past + frames - taps[0]) // t + 1
        sizes = [(n - 1) // step + 1 for n, step in zip(size, (h, w), strict=True)]
    else:
        length = 1 + (frames - 1) * t if past is None else frames * t
        sizes = [n * times for n, times in zip(size, (h, w), strict=True)]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    fan_in = width * taps[0] * taps[1] * taps[2]
    return Call(
        x=channels_last(draw(*shape)),
        weight=draw(channels, width, *taps).div(fan_in**0.5),
        bias=draw(channels) if bias else None,
        past=None if past is None else channels_last(draw(batch, width, past, *size)),
        dy=channels_last(draw(batch, channels, length, *sizes)),
        stride=stride,
        factor=factor,
    )


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def apply(call: Call) -> Tensor:
    """The public function."""
    if call.factor is None:
        return causal_conv3d(call.x, call.weight, call.bias, stride=call.stride, past=call.past)
    return upsample_causal_conv3d(
        call.x, call.weight, call.bias, factor=call.factor, past=call.past
    )


def differentiate(function: Callable[[Call], Tensor], call: Call) -> list[Tensor | None]:
    """y and the gradients of x, weight, bias and past."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in call.leaves]
    x, weight, bias, past = leaves
    y = function(replace(call, x=x, weight=weight, bias=bias, past=past))
    given = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(y, given, call.dy, allow_unused=True))
    return [y.detach(), *(None if t is None else next(gradients) for t in leaves)]


def skip_unless_taken(name: str, dtype: torch.dtype) -> None:
    """The C++ kernel computes in fp32 and takes nothing else."""
    if name == "cpu_impl" and dtype != torch.float32:
        pytest.skip(f"cpu_impl takes float32, not {dtype}")


def run(name: str, call: Call) -> list[Tensor | None]:
    """The same of one implementation."""
    skip_unless_taken(name, call.x.dtype)
    with use(name, ROOM):
        return differentiate(apply, call)


def clip(call: Call) -> Tensor:
    """What the kernel slides over, with its frames before the first, by index."""
    x, past, lead = call.x, call.past, call.weight.shape[2] - 1
    t, h, w = call.factor or ONES
    whole = x if past is None else torch.cat((past, x), 2)
    if past is None:
        order = [0] * lead + [0] + [n for n in range(1, x.shape[2]) for _ in range(t)]
    elif call.factor is None:
        order = list(range(whole.shape[2]))
    else:
        order = [n for n in range(whole.shape[2]) for _ in range(t)]
        order = ([0] * lead + order)[-(x.shape[2] * t + lead) :]
    whole = whole[:, :, order]
    return whole.repeat_interleave(h, 3).repeat_interleave(w, 4)


def by_definition(call: Call) -> Tensor:
    """Tap by tap: every tap reads the nearest pixel inside of the frame."""
    seen, (st, sh, sw) = clip(call), call.stride
    kt, kh, kw = call.weight.shape[2:]
    height, width = seen.shape[3:]
    times = torch.arange(0, seen.shape[2] - kt + 1, st)
    out: Tensor | float = 0.0
    for i, j, k in product(range(kt), range(kh), range(kw)):
        rows = (torch.arange(0, height, sh) + j - kh // 2).clamp(0, height - 1)
        columns = (torch.arange(0, width, sw) + k - kw // 2).clamp(0, width - 1)
        met = seen[:, :, times + i][:, :, :, rows][..., columns]
        out = out + torch.einsum("oc,bcthw->bothw", call.weight[:, :, i, j, k], met)
    return out if call.bias is None else out + call.bias.view(1, -1, 1, 1, 1)


def as_torch_would(call: Call) -> Tensor:
    """Repeat, pad, convolve, in the layout that the op is for."""
    rows, columns = (n // 2 for n in call.weight.shape[3:])
    padded = F.pad(clip(call), (columns, columns, rows, rows, 0, 0), mode="replicate")
    return F.conv3d(channels_last(padded), call.weight, call.bias, call.stride)


def truth(call: Call) -> list[Tensor | None]:
    """In float64, of the call's own values."""
    return differentiate(by_definition, call.map(lambda t: t.detach().cpu().double()))


def plain(call: Call) -> list[Tensor | None]:
    """In the call's own dtype."""
    return differentiate(as_torch_would, call.map(lambda t: t.detach().cpu()))


def assert_right(results: list[Tensor | None], call: Call) -> None:
    """Tier B for everything that the call has, in its dtype, maps channels-last."""
    exact, same_dtype = truth(call), plain(call)
    # With fp32 inputs only the order of summation is left to compare, and it is anyone's; that of
    # few numbers is luck, which one rounding of the largest stands for.
    single = call.x.dtype == torch.float32
    factor, luck = (3.0, 2.0**-23) if single else (2.0, 0.0)
    for label, got, true, own in zip(RESULTS, results, exact, same_dtype, strict=True):
        assert (got is None) == (true is None), label
        if got is None:
            continue
        assert got.dtype == call.x.dtype, label
        if label in ("y", "dx", "dpast"):
            assert got.is_contiguous(memory_format=torch.channels_last_3d), label
        else:
            assert got.is_contiguous(), label
        if luck and true.numel():
            own = own.double() + luck * true.abs().max() * (own.double() - true).sign()
        assert_as_good_as(got.cpu(), true, own, name=label, factor=factor)
