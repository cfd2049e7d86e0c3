"""Calls of group_norm_silu, and what plain torch makes of them in any precision."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import group_norm_silu
from tests.kit.inputs import draw
from tests.kit.numerics import assert_as_good_as, assert_rounded_once

ROOM = "group_norm_silu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("y", "dx", "dweight", "dbias")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call and the gradient of its result."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    dy: Tensor
    silu: bool = True
    eps: float = 1e-6

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that is differentiated."""
        return self.x, self.weight, self.bias

    @property
    def arguments(self) -> tuple[object, ...]:
        """As ``forward`` of an implementation takes them."""
        return self.x, self.groups, self.weight, self.bias, self.eps, self.silu, None

    def with_leaves(self, leaves: Sequence[Tensor]) -> "Call":
        """The same with other tensors for ``leaves``."""
        x, weight, bias = leaves
        return replace(self, x=x, weight=weight, bias=bias)


def draw_call(
    generator: torch.Generator,
    shape: tuple[int, ...] = (2, 8, 3, 5, 7),
    groups: int = 4,
    *,
    silu: bool = True,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    family: str = "normal",
) -> Call:
    """Random tensors, channels-last as in the models."""
    x = draw(family, shape, generator, dtype)
    weight = 1 + 0.3 * torch.randn(shape[1], generator=generator)
    bias = 0.5 * torch.randn(shape[1], generator=generator)
    weight_dtype = weight_dtype or dtype
    return Call(
        x=last(x),
        weight=weight.to(weight_dtype),
        bias=bias.to(weight_dtype),
        groups=groups,
        dy=last(draw("normal", shape, generator, dtype)),
        silu=silu,
    )


def last(x: Tensor) -> Tensor:
    """x with its channels adjacent in memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def apply(call: Call) -> Tensor:
    """The public function."""
    return group_norm_silu(
        call.x, call.groups, call.weight, call.bias, eps=call.eps, silu=call.silu
    )


def compose(call: Call) -> Tensor:
    """The formula, step by step, in the dtype of x."""
    x = call.x.contiguous()
    values = x.reshape(len(x), call.groups, -1)
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    normed = (centred / torch.sqrt(variance + call.eps)).reshape(x.shape)
    weight, bias = (v.to(x.dtype)[:, None, None, None] for v in (call.weight, call.bias))
    z = normed * weight + bias
    return z * torch.sigmoid(z) if call.silu else z


def plain(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of ``compose`` computed in ``dtype``; float64 is the truth."""
    leaves = [t.detach().cpu().to(dtype, copy=True).requires_grad_() for t in call.leaves]
    moved = replace(call.with_leaves(leaves), dy=call.dy.cpu().to(dtype))
    return _differentiate(compose, moved, leaves)


def run(name: str, call: Call) -> list[Tensor]:
    """Output and gradients of one implementation, through the public function."""
    leaves = [t.detach().requires_grad_() for t in call.leaves]
    with use(name, ROOM):
        return _differentiate(apply, call.with_leaves(leaves), leaves)


def _differentiate(function, call: Call, leaves: list[Tensor]) -> list[Tensor]:
    y = function(call)
    return [y.detach(), *torch.autograd.grad(y, leaves, call.dy)]


def assert_right(actual: Sequence[Tensor], call: Call) -> None:
    """Tier A for y and dx, and for the gradients plain torch's error twice over as well."""
    exact, single = plain(call, torch.float64), plain(call, torch.float32)
    same = single if call.x.dtype == torch.float32 else plain(call, call.x.dtype)
    actual = [t.cpu() for t in actual]
    for index in range(2):
        assert_rounded_once(actual[index], exact[index], single[index], name=NAMES[index])
    for index in range(1, 4):
        if exact[index].numel() < 64:  # the worst of a few errors is no yardstick
            _assert_close_for_its_terms(actual[index], exact[index], call, NAMES[index])
            continue
        # fp16 by itself loses the squares of tiny values
        yardstick = same[index] if same[index].isfinite().all() else single[index]
        yardstick = yardstick.to(actual[index].dtype)
        assert_as_good_as(actual[index], exact[index], yardstick, name=NAMES[index])


def _assert_close_for_its_terms(actual: Tensor, exact: Tensor, call: Call, name: str) -> None:
    """A sum of few channels, judged by the size of its terms."""
    if name == "dx":
        return  # a value of its own, and judged as one
    terms = call.dy.double().abs().sum((0, 2, 3, 4)).max()
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual.double(), exact, rtol=eps, atol=float(4 * 2.0**-24 * terms), msg=name
    )


def answering_on_cpu(interpreted: bool) -> tuple[str, ...]:
    """The implementations that take tensors on the CPU here."""
    away = {"cuda_impl"} if interpreted else {"cuda_impl", "triton_impl"}
    return tuple(name for name in implementations(ROOM) if name not in away)
