"""Adaptive layer norm in one pass.

Formula and contract: ``hunyuan_fast.kernels.fused_modulation``.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from hunyuan_fast.dispatch import select

_ROOM = "fused_modulation"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last dimension without weights, then ``* (1 + scale) + shift``.

    x: (B, L, E), of any strides; shift, scale: (B, E), one dtype for both, which may differ from
    that of x: under autocast one is often fp32 and the other bf16, and both are read exactly.
    fp32, bf16, fp16; float64 only for all three together, and then computed in float64.

    Returns (B, L, E), contiguous, in the dtype of x, under autocast too: computed in fp32 and
    rounded once. Gradients come in the dtype of their tensor; a second derivative is refused.
    Raises TypeError or ValueError when shapes, dtypes, devices or eps do not fit.
    """
    _check_x(x)
    _check_vector("shift", shift, x)
    _check_vector("scale", scale, x)
    if shift.dtype != scale.dtype:
        raise TypeError(
            f"shift must have the dtype of scale, {scale.dtype}, got {shift.dtype}; cast one"
        )
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return _forward(x, shift, scale, float(eps))[0]


@custom_op("hunyuan_fast::layer_norm_modulate", mutates_args=())
def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return select(_ROOM, x, shift, scale, eps).forward(x, shift, scale, eps)


@custom_op("hunyuan_fast::layer_norm_modulate_bwd", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # shift takes no part in backward; it looks like scale.
    implementation = select(_ROOM, x, scale, scale, eps)
    return implementation.backward(dy, x, scale, mean, rstd)


@_forward.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, scale, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    gradients = _backward(dy, *ctx.saved_tensors, ctx.eps)
    needed = ctx.needs_input_grad
    return *(g if n else None for g, n in zip(gradients, needed, strict=False)), None


def _refuse_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "layer_norm_modulate has no second derivative: do not differentiate through its backward "
        "(create_graph=True)"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse_second_derivative)


def _check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it")
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, E), got shape {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"the width E of x must be at least 1, got shape {tuple(x.shape)}")


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {vector.dtype}; cast it"
        )
    if (vector.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"{name} and x must both be float64 or neither, got {vector.dtype} and {x.dtype}"
        )
    expected = (x.shape[0], x.shape[2])
    if vector.shape != expected:
        raise ValueError(
            f"{name} must be (B, E) = {expected} for x of shape {tuple(x.shape)}, "
            f"got {tuple(vector.shape)}"
        )
    if vector.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {vector.device}")
