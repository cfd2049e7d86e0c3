"""Calls of qk_norm_rope, and what plain torch makes of them in any precision."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import qk_norm_rope
from tests.kit.inputs import draw
from tests.kit.numerics import assert_as_good_as, assert_equal, assert_rounded_once

ROOM = "qk_norm_rope"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call and the gradients of its outputs. text: empty in one stream."""

    qkv: Tensor
    weights: tuple[Tensor, Tensor]
    tables: tuple[Tensor, Tensor]
    num_heads: int
    text: tuple[Tensor, Tensor, Tensor] | tuple[()] = ()
    gradients: tuple[Tensor, Tensor, Tensor]
    eps: float = 1e-6

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Everything that is differentiated."""
        return self.qkv, *self.weights, *self.text

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs and of the gradients of the leaves."""
        text = ("text_qkv", "text_q_weight", "text_k_weight") if self.text else ()
        leaves = ("qkv", "q_weight", "k_weight", *text)
        return *OUTPUTS, *(f"d{name}" for name in leaves)

    @property
    def arguments(self) -> tuple[object, ...]:
        """As ``forward`` of an implementation takes them."""
        text = self.text or (None, None, None)
        return self.qkv, *self.weights, *self.tables, self.num_heads, *text, self.eps

    def with_leaves(self, leaves: Sequence[Tensor]) -> "Call":
        """The same with other tensors for ``leaves``."""
        qkv, q_weight, k_weight, *text = leaves
        return replace(self, qkv=qkv, weights=(q_weight, k_weight), text=tuple(text))


def draw_call(
    generator: torch.Generator,
    *,
    batch: int = 2,
    video: int = 5,
    text: int = 3,
    heads: int = 2,
    head_dim: int = 64,
    streams: int = 2,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    family: str = "normal",
    eps: float = 1e-6,
) -> Call:
    """Random tensors; in one stream the text rows follow the video rows in qkv."""
    width = 3 * heads * head_dim
    rows = [video, text] if streams == 2 else [video + text]
    packed = [draw(family, (batch, length, width), generator, dtype) for length in rows]
    weights = [
        (1 + 0.3 * torch.randn(head_dim, generator=generator)).to(weight_dtype or dtype)
        for _ in range(2 * streams)
    ]
    theta = 6.28 * torch.rand(video, head_dim // 2, generator=generator)
    theta = theta.repeat_interleave(2, dim=-1)
    shape = (batch, video + text, heads, head_dim)
    return Call(
        qkv=packed[0],
        weights=(weights[0], weights[1]),
        tables=(theta.cos(), theta.sin()),
        num_heads=heads,
        text=(packed[1], weights[2], weights[3]) if streams == 2 else (),
        gradients=tuple(draw("normal", shape, generator, dtype) for _ in range(3)),
        eps=eps,
    )


def apply(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The public function on a call."""
    text = dict(zip(("text_qkv", "text_q_weight", "text_k_weight"), call.text, strict=False))
    return qk_norm_rope(
        call.qkv, *call.weights, *call.tables, num_heads=call.num_heads, eps=call.eps, **text
    )


def compose(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The same of plain operations, each rounding to the dtype of qkv, as models write it."""
    streams = [(call.qkv, *call.weights)] + ([call.text] if call.text else [])
    dtype, (cos, sin) = call.qkv.dtype, call.tables
    wide = torch.promote_types(dtype, torch.float32)
    parts = []
    for packed, *weights in streams:
        *xs, v = packed.unflatten(-1, (3, call.num_heads, -1)).unbind(2)
        normed = [
            torch.nn.functional.rms_norm(x.to(wide), x.shape[-1:], eps=call.eps).to(dtype)
            * weight.to(dtype)
            for x, weight in zip(xs, weights, strict=True)
        ]
        parts.append((*normed, v))
    q, k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    angles = torch.complex(cos, sin)[:, None, 0::2].to(torch.promote_types(wide, torch.complex64))
    q, k = (
        torch.cat((_turn(x[:, : len(cos)].to(wide), angles).to(dtype), x[:, len(cos) :]), dim=1)
        for x in (q, k)
    )
    return q, k, v


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


def plain(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of ``compose`` computed in ``dtype``; float64 is the truth."""
    leaves = [t.detach().cpu().to(dtype, copy=True).requires_grad_() for t in call.leaves]
    moved = replace(
        call.with_leaves(leaves),
        tables=tuple(table.cpu() for table in call.tables),
        gradients=tuple(t.cpu().to(dtype) for t in call.gradients),
    )
    return _differentiate(compose, moved, leaves)


def run(name: str, call: Call) -> list[Tensor]:
    """Outputs and gradients of one implementation, through the public function."""
    leaves = [t.detach().requires_grad_() for t in call.leaves]
    with use(name, ROOM):
        return _differentiate(apply, call.with_leaves(leaves), leaves)


def _differentiate(function, call: Call, leaves: list[Tensor]) -> list[Tensor]:
    outputs = function(call)
    gradients = torch.autograd.grad(outputs, leaves, call.gradients)
    return [*(t.detach() for t in outputs), *gradients]


def assert_right(actual: Sequence[Tensor], call: Call) -> None:
    """Tier A, v copied, and for the gradients plain torch's error twice over as well."""
    exact, single = plain(call, torch.float64), plain(call, torch.float32)
    same = plain(call, call.qkv.dtype)
    actual = [t.cpu() for t in actual]
    for index in range(2):
        assert_rounded_once(actual[index], exact[index], single[index], name=OUTPUTS[index])
    assert_equal(actual[2], same[2], name="v")
    for index in range(3, len(call.names)):
        # The worst of a few errors, as a short weight has, is no yardstick: it may be zero by luck.
        factor = 2.0 if exact[index].numel() >= 64 else 4.0
        assert_as_good_as(
            actual[index], exact[index], same[index], name=call.names[index], factor=factor
        )
        if actual[index].dim() > 1:
            assert_rounded_once(actual[index], exact[index], single[index], name=call.names[index])


def answering_on_cpu(interpreted: bool) -> tuple[str, ...]:
    """The implementations that take tensors on the CPU here."""
    away = {"cuda_impl"} if interpreted else {"cuda_impl", "triton_impl"}
    return tuple(name for name in implementations(ROOM) if name not in away)
