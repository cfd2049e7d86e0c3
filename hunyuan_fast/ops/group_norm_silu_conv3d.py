"""Group norm, SiLU and the convolution behind them, of which backward keeps the input alone.

The rooms of ``group_norm_silu`` and ``causal_conv3d`` answer, one after the other. A map with its
norm applied is as large as the map, and for backward both would be kept; here it is made again, in
one pass over memory, from the map and its statistics.
"""

from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.ops.causal_conv3d import _autocast, _check_weights, causal_conv3d
from hunyuan_fast.ops.causal_conv3d import _backward as _conv_backward
from hunyuan_fast.ops.causal_conv3d import _fake_forward as _conv_fake
from hunyuan_fast.ops.causal_conv3d import _forward_kernel as _conv_kernel
from hunyuan_fast.ops.group_norm_silu import _backward as _norm_backward
from hunyuan_fast.ops.group_norm_silu import _check_eps, _check_maps, _check_vector, group_norm_silu
from hunyuan_fast.ops.group_norm_silu import _fake_statistics as _norm_fake
from hunyuan_fast.ops.group_norm_silu import _forward as _norm_forward
from hunyuan_fast.ops.group_norm_silu import _forward_kernel as _norm_kernel
from hunyuan_fast.ops.operator import define

_STRIDE = (1, 1, 1)


def group_norm_silu_conv3d(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``causal_conv3d(group_norm_silu(x, num_groups, norm_weight, norm_bias), weight, bias)``.

    The same bits, forward and backward, and half the memory between them: backward keeps x, its
    statistics and the weights. Arguments, autocast and errors are those of the two; the convolution
    has stride one. Where autocast gives it another dtype than x has, the two are called apart.
    """
    _check_maps(x, num_groups)
    _check_vector("norm_weight", norm_weight, x)
    _check_vector("norm_bias", norm_bias, x)
    _check_eps(eps)
    narrow, bias = _autocast(weight, bias)
    if narrow.dtype != x.dtype:
        normed = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps=eps)
        return causal_conv3d(normed, weight, bias)
    _check_weights(narrow, bias, x)
    y: Tensor = _forward(x, num_groups, norm_weight, norm_bias, float(eps), narrow, bias)[0]
    return y


def _kernel(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    normed, stats = _norm_kernel(x, num_groups, norm_weight, norm_bias, eps, True, None)
    return _conv_kernel(normed, weight, bias, None, *_STRIDE), stats


def _fake(
    x: Tensor, num_groups: int, _: Tensor, __: Tensor, eps: float, weight: Tensor, bias: Any
) -> tuple[Tensor, Tensor]:
    return _conv_fake(x, weight, bias, None, *_STRIDE), _norm_fake(x, num_groups)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, norm_weight, norm_bias, ctx.eps, weight, _ = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, stats, weight = ctx.saved_tensors
    want_x, _, *want_norm, _, want_weight, want_bias = ctx.needs_input_grad
    vectors = norm_weight, norm_bias
    with torch.no_grad():  # given statistics are for inference
        normed = _norm_forward(x, stats.shape[2], *vectors, ctx.eps, True, stats)[0]
    want_input = want_x or any(want_norm)
    wants = want_input, want_weight, want_bias, False
    dnormed, dweight, dbias, _ = _conv_backward(dy, normed, weight, None, *_STRIDE, False, *wants)
    del normed
    dx = dnorm_weight = dnorm_bias = None
    if want_input:
        dx, *of_norm = _norm_backward(dnormed, x, *vectors, stats, ctx.eps, True)
        dnorm_weight, dnorm_bias = (d.to(v.dtype) for d, v in zip(of_norm, vectors, strict=True))
    dweight, dbias = dweight if want_weight else None, dbias if want_bias else None
    return dx, None, dnorm_weight, dnorm_bias, None, dweight, dbias


_forward = define(
    "group_norm_silu_conv3d(Tensor x, SymInt num_groups, Tensor norm_weight, Tensor norm_bias, "
    "float eps, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    save=_save,
    gradients=_gradients,
)
