"""Adaptive layer norm and gated residual sum, apart or in one pass.

Formula and contract: ``hunyuan_fast.kernels.fused_modulation``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "fused_modulation"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Tensors = tuple[Tensor | None, ...]


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, index: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Layer norm over the last dimension without weights, then ``* (1 + scale) + shift``.

    x: (B, L, E), of any strides. shift, scale: (B, E), or with an index (B, M, E); one dtype for
    both, which may differ from that of x: under autocast one is often fp32 and the other bf16, and
    both are read exactly. fp32, bf16, fp16; float64 only for all together, and then computed so.
    index: (B, L) int32 or int64, which of the M vectors of its sample a token meets, 0 to M - 1:
        tokens of a clean first frame need others than the rest. On a GPU its values are not looked
        at; one outside the range reads foreign memory.

    Returns (B, L, E), contiguous, in the dtype of x, under autocast too: computed in fp32 and
    rounded once. Gradients come in the dtype of their tensor; a second derivative is refused.
    Raises TypeError or ValueError when shapes, dtypes, devices, eps or, on the CPU, values of
    index do not fit.
    """
    _check_rows(x)
    _check_vectors(x, index, ("shift", shift), ("scale", scale))
    _, modulated, _ = _forward(x, shift, scale, _checked_eps(eps), None, None, index)
    return modulated


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, index: Tensor | None = None) -> Tensor:
    """``x + gate * y``: what a layer adds to the residual stream.

    x, y: (B, L, E), of any strides and one dtype; y may be bf16 or fp16 beside x in fp32.
    gate, index: as scale and index in :func:`layer_norm_modulate`.

    Returns (B, L, E), contiguous, in the dtype of x, computed in fp32 and rounded once. Gradients,
    second derivatives and errors as in :func:`layer_norm_modulate`.
    """
    _check_rows(x, y)
    _check_vectors(x, index, ("gate", gate))
    residual, _, _ = _forward(x, None, None, 0.0, y, gate, index)
    return residual


def gate_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    index: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """:func:`gate_residual`, and :func:`layer_norm_modulate` of its result, in one pass.

    Arguments as there; gate, shift and scale have one dtype.

    Returns residual and modulated, both (B, L, E) in the dtype of x: what the two functions would
    return one after the other. Gradients, second derivatives and errors as there.
    """
    _check_rows(x, y)
    _check_vectors(x, index, ("gate", gate), ("shift", shift), ("scale", scale))
    residual, modulated, _ = _forward(x, shift, scale, _checked_eps(eps), y, gate, index)
    return residual, modulated


def _forward_kernel(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
) -> _Tensors:
    if index is not None:
        _check_values(index, gate if scale is None else scale)  # type: ignore[arg-type]
    implementation = select(_ROOM, x, shift, scale, eps, y, gate, index)
    return implementation.forward(x, shift, scale, eps, y, gate, index)


def _backward_kernel(
    dmodulated: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    dresidual: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
    y_dtype: torch.dtype | None,
    eps: float,
) -> _Tensors:
    # shift takes no part in backward; it looks like scale.
    x = dresidual if residual is None else residual
    implementation = select(_ROOM, x, scale, scale, eps, y, gate, index)
    return implementation.backward(
        dmodulated, residual, scale, stats, dresidual, y, gate, index, y_dtype
    )


def _fake_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, y: Any, gate: Any, index: Any
) -> _Tensors:
    residual = None if gate is None else x.new_empty(x.shape)
    if scale is None:
        return residual, None, None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return residual, x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=dtype)


def _fake_backward(
    dmodulated: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    dresidual: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
    y_dtype: torch.dtype | None,
    eps: float,
) -> _Tensors:
    like: Tensor = dresidual if residual is None else residual  # type: ignore[assignment]
    dx = dshift = dscale = dy = dgate = None
    if scale is not None:
        dx = like.new_empty(like.shape)
        dshift, dscale = (scale.new_empty(scale.shape) for _ in range(2))
    if y_dtype is not None:
        dy = like.new_empty(like.shape, dtype=y_dtype)
    if y is not None and gate is not None:
        dgate = gate.new_empty(gate.shape)
    return dx, dshift, dscale, dy, dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    """Keep what the gradients that are wanted need, and nothing else."""
    x, _, scale, ctx.eps, y, gate, index = inputs
    residual, _, stats = output
    ctx.set_materialize_grads(False)
    if stats is not None:
        ctx.mark_non_differentiable(stats)
    wants = ctx.needs_input_grad
    ctx.y_dtype = y.dtype if wants[4] else None
    ctx.save_for_backward(
        None if scale is None else x if gate is None else residual,
        scale,
        None if scale is None else stats,
        y if wants[5] else None,
        gate,
        index,
    )


def _gradients(ctx: Any, dresidual: Tensor | None, dmodulated: Tensor | None, _: None) -> _Tensors:
    """Of x, shift, scale, eps, y, gate and index, as many as are wanted."""
    residual, scale, stats, y, gate, index = ctx.saved_tensors
    wants = ctx.needs_input_grad
    if gate is None:
        dresidual = None
    if dmodulated is None or scale is None:  # what is left is the sum, whose dx is dresidual
        dmodulated = residual = scale = stats = None
    dx, dshift, dscale, dy, dgate = dresidual, None, None, None, None
    if dmodulated is not None or (dresidual is not None and (wants[4] or wants[5])):
        through, *of_vectors, dy, dgate = _backward(
            *(dmodulated, residual, scale, stats, dresidual, y, gate, index, ctx.y_dtype, ctx.eps)
        )
        if dmodulated is not None:
            dx, (dshift, dscale) = through, of_vectors
    return (
        dx if wants[0] else None,
        dshift if wants[1] else None,
        dscale if wants[2] else None,
        None,
        dy if wants[4] else None,
        dgate if wants[5] else None,
        None,
    )


def _name_the_function(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    halves = ("gate_residual", inputs[6]), ("layer_norm_modulate", inputs[2])
    ctx.function = "_".join(name for name, vectors in halves if vectors is not None)


def _refuse(ctx: Any, *_: Any) -> None:
    refuse_second_derivative(ctx.function)(ctx)


# One operator for the three functions: a half that is missing has no results.
_forward = define(
    "fused_modulation(Tensor x, Tensor? shift, Tensor? scale, float eps, Tensor? y, Tensor? gate, "
    "Tensor? index) -> (Tensor, Tensor, Tensor)",
    _forward_kernel,
    _fake_forward,
    save=_save,
    gradients=_gradients,
)
_backward = define(
    "fused_modulation_bwd(Tensor? dmodulated, Tensor? residual, Tensor? scale, Tensor? stats, "
    "Tensor? dresidual, Tensor? y, Tensor? gate, Tensor? index, ScalarType? y_dtype, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _fake_backward,
    save=_name_the_function,
    gradients=_refuse,
)


def _check_rows(x: Tensor, *others: Tensor) -> None:
    _check_numbers("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, E), got shape {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"the width E of x must be at least 1, got shape {tuple(x.shape)}")
    for y in others:
        _check_numbers("y", y)
        if y.dtype != x.dtype and (x.dtype != torch.float32 or y.dtype == torch.float64):
            raise TypeError(
                f"y must have the dtype of x, {x.dtype}, or be bfloat16 or float16 beside x in "
                f"float32, got {y.dtype}; cast it"
            )
        if y.shape != x.shape:
            raise ValueError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")


def _check_vectors(x: Tensor, index: Tensor | None, *named: tuple[str, Tensor]) -> None:
    """Of x only what ``_check_rows`` has passed."""
    batch, _, width = x.shape
    last_name, last = named[-1]
    expected: tuple[int, ...] = (batch, width)
    if index is not None:
        _check_index(index, x)
        is_several = isinstance(last, Tensor) and last.dim() == 3 and last.shape[1] > 0
        expected = (batch, last.shape[1] if is_several else 1, width)
    for name, vector in named:
        _check_numbers(name, vector)
        if (vector.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"{name} and x must both be float64 or neither, got {vector.dtype} and {x.dtype}"
            )
        if vector.shape != expected:
            layout = "(B, E)" if index is None else "with an index (B, M, E)"
            raise ValueError(
                f"{name} must be {layout} = {expected} for x of shape {tuple(x.shape)}, "
                f"got {tuple(vector.shape)}"
            )
        if vector.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {vector.device}")
    for name, vector in named[:-1]:
        if vector.dtype != last.dtype:
            raise TypeError(
                f"{name} must have the dtype of {last_name}, {last.dtype}, got {vector.dtype}; "
                "cast one"
            )


def _check_numbers(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}; cast it"
        )


def _check_index(index: Tensor, x: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.shape != x.shape[:2]:
        raise ValueError(
            f"index must be (B, L) = {tuple(x.shape[:2])} for x of shape {tuple(x.shape)}, "
            f"got {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index must be on the device of x, {x.device}, got {index.device}")


def _check_values(index: Tensor, vectors: Tensor) -> None:
    """That every token has its vector. On a GPU this would wait for all that is queued."""
    if not index.is_cpu or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= vectors.shape[1]:
        raise ValueError(
            f"index must lie in [0, M - 1] = [0, {vectors.shape[1] - 1}], got {low} to {high}"
        )


def _checked_eps(eps: float) -> float:
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return float(eps)
