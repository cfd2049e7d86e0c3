"""Adaptive layer norm and gated residual sum, apart or in one pass.

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
_Tensors = tuple[Tensor | None, ...]

# Who may look at a call. The names are private; in a torch without one of them everybody may.
_SIGNS = (
    "_len_torch_dispatch_stack",
    "_is_torch_function_mode_enabled",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
)
_dispatch_modes, _function_modes, _transforms, _tracing = (
    getattr(torch._C, sign, lambda: True) for sign in _SIGNS
)


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
    _, modulated = _call(x, shift, scale, _checked_eps(eps), None, None, index)
    return modulated  # type: ignore[return-value]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, index: Tensor | None = None) -> Tensor:
    """``x + gate * y``: what a layer adds to the residual stream.

    x, y: (B, L, E), of any strides and one dtype; y may be bf16 or fp16 beside x in fp32.
    gate, index: as scale and index in :func:`layer_norm_modulate`.

    Returns (B, L, E), contiguous, in the dtype of x, computed in fp32 and rounded once. Gradients,
    second derivatives and errors as in :func:`layer_norm_modulate`.
    """
    _check_rows(x, y)
    _check_vectors(x, index, ("gate", gate))
    residual, _ = _call(x, None, None, 0.0, y, gate, index)
    return residual  # type: ignore[return-value]


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
    return _call(x, shift, scale, _checked_eps(eps), y, gate, index)  # type: ignore[return-value]


def _call(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
) -> _Tensors:
    """residual and modulated, by the shortest way; None for that of a half which is missing.

    torch.library costs some 10 microseconds a call and twice that with gradients, more than the
    kernels take on small tensors. Nobody needs it where nobody looks.
    """
    if torch.compiler.is_compiling() or _watched(x, shift, scale, y, gate, index):
        residual, modulated, _ = _forward_op(x, shift, scale, eps, y, gate, index)
        return None if gate is None else residual, None if scale is None else modulated
    if torch.is_grad_enabled():
        for t in (x, shift, scale, y, gate):
            if t is not None and t.requires_grad:
                return _Direct.apply(x, shift, scale, eps, y, gate, index)  # type: ignore[no-any-return]
    return _forward(x, shift, scale, eps, y, gate, index)[:2]


def _watched(*tensors: Tensor | None) -> bool:
    """Whether somebody traces, transforms or replaces calls of torch, or made the tensors to."""
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return True
    return bool(_dispatch_modes() or _function_modes() or _transforms() or _tracing())


def _forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
) -> _Tensors:
    if index is None:
        implementation = select(_ROOM, x, shift, scale, eps, y, gate)
    else:
        _check_values(index, gate if scale is None else scale)  # type: ignore[arg-type]
        implementation = select(_ROOM, x, shift, scale, eps, y, gate, index)
    return implementation.forward(x, shift, scale, eps, y, gate, index)  # type: ignore[no-any-return]


def _backward(
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
    return implementation.backward(  # type: ignore[no-any-return]
        dmodulated, residual, scale, stats, dresidual, y, gate, index, y_dtype
    )


# One operator for the three functions: what a half that is missing would return is empty.
@custom_op("hunyuan_fast::fused_modulation", mutates_args=())
def _forward_op(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    residual, modulated, stats = _forward(x, shift, scale, eps, y, gate, index)
    return _or_empty(residual, x), _or_empty(modulated, x), _or_empty(stats, x)


@custom_op("hunyuan_fast::fused_modulation_bwd", mutates_args=())
def _backward_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward(
        dmodulated, residual, scale, stats, dresidual, y, gate, index, y_dtype, eps
    )
    like: Tensor = dresidual if residual is None else residual  # type: ignore[assignment]
    dx, dshift, dscale, dy, dgate = (_or_empty(g, like) for g in gradients)
    return dx, dshift, dscale, dy, dgate


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


@_forward_op.register_fake
def _(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = x.new_empty(0 if gate is None else x.shape)
    if scale is None:
        return residual, x.new_empty(0), x.new_empty(0)
    return residual, x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=dtype)


@_backward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like: Tensor = dresidual if residual is None else residual  # type: ignore[assignment]
    none = [like.new_empty(0) for _ in range(5)]
    dx, dshift, dscale, dy, dgate = none
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
    wants = ctx.needs_input_grad
    ctx.y_dtype = y.dtype if wants[4] else None
    ctx.save_for_backward(
        None if scale is None else x if gate is None else residual,
        scale,
        stats if scale is not None else None,
        y if wants[5] else None,
        gate,
        index,
    )


def _gradients(ctx: Any, dresidual: Tensor | None, dmodulated: Tensor | None, *_: None) -> _Tensors:
    """Of x, shift, scale, eps, y, gate and index, as many as are wanted."""
    residual, scale, stats, y, gate, index = ctx.saved_tensors
    wants = ctx.needs_input_grad
    if gate is None:
        dresidual = None
    if dmodulated is None or scale is None:  # what is left is the sum, whose dx is dresidual
        dmodulated = residual = scale = stats = None
        dx, dshift, dscale, dy, dgate = dresidual, None, None, None, None
    if dmodulated is not None or (dresidual is not None and (wants[4] or wants[5])):
        args = (dmodulated, residual, scale, stats, dresidual, y, gate, index, ctx.y_dtype, ctx.eps)
        if torch.is_grad_enabled() or _watched(*args[:8]):
            through, dshift, dscale, dy, dgate = _backward_op(*args)
        else:
            through, dshift, dscale, dy, dgate = _backward(*args)
        if dmodulated is not None:
            dx = through
    return (
        dx if wants[0] else None,
        dshift if wants[1] else None,
        dscale if wants[2] else None,
        None,
        dy if wants[4] else None,
        dgate if wants[5] else None,
        None,
    )


def _name_the_function(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    halves = ("gate_residual", inputs[6]), ("layer_norm_modulate", inputs[2])
    ctx.name = "_".join(name for name, vectors in halves if vectors is not None)


def _refuse_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"{ctx.name} has no second derivative: do not differentiate through its backward "
        "(create_graph=True)"
    )


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    _save(ctx, inputs, output)


_forward_op.register_autograd(_gradients, setup_context=_save_for_op)
_backward_op.register_autograd(_refuse_second_derivative, setup_context=_name_the_function)


class _Direct(torch.autograd.Function):
    """The same gradients without torch.library in between."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> _Tensors:
        output = _forward(*args)
        _save(ctx, args, output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dresidual: Tensor | None, dmodulated: Tensor | None) -> _Tensors:
        return _gradients(ctx, dresidual, dmodulated)


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
