"""GELU in its tanh form, by itself or written behind another tensor.

Formula and contract: ``hunyuan_fast.kernels.gelu_tanh``.
"""

from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.memory import apart
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "gelu_tanh"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gelu_tanh(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``, element by element.

    x: (..., M), of any strides; fp32, bf16, fp16, or float64, which is computed in float64.
    out: a tensor of the shape and dtype of x to write into and return: x itself, or one of any
        strides (a view beside other results, say) that shares no memory with x. Inference only.

    Returns (..., M), contiguous unless it is ``out``, in the dtype of x, under autocast too:
    computed in fp32 and rounded once; 0 for -inf, NaN for NaN. A second derivative is refused.
    Raises TypeError or ValueError when shapes, dtypes, devices or memory do not fit.
    """
    _check_tensor("x", x)
    if out is None:
        return _forward(x)
    _check_out(out, x)
    _forward_out(x, out)
    return out


def concat_gelu_tanh(left: Tensor, x: Tensor) -> Tensor:
    """``[left, gelu_tanh(x)]`` along the last dimension, in one pass.

    left: (B, L, E); x: (B, L, M); of one dtype and any strides (x is a view of what a linear layer
    made, say). Returns (B, L, E + M), contiguous, with the precision of :func:`gelu_tanh`.
    Backward keeps x, not a copy; the gradient of left is a view of the incoming one. A second
    derivative is refused. Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    _check_tensor("x", x)
    _check_left(left, x)
    return _concat(left, x)


def _forward_kernel(x: Tensor) -> Tensor:
    return select(_ROOM, x).forward(x)


def _fake_forward(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> Tensor:
    return _backward(dy, *ctx.saved_tensors)


def _out_kernel(x: Tensor, out: Tensor) -> None:
    _check_memory(x, out)
    select(_ROOM, x, None, out).forward(x, None, out)


def _fake_out(x: Tensor, out: Tensor) -> None:
    return None


def _concat_kernel(left: Tensor, x: Tensor) -> Tensor:
    return select(_ROOM, x, left).forward(x, left)


def _fake_concat(left: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], left.shape[-1] + x.shape[-1]))


def _save_concat(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    left, x = inputs
    ctx.left_width = left.shape[-1]
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(x)


def _concat_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dleft = dx = None
    if ctx.needs_input_grad[0]:
        dleft = dy.narrow(-1, 0, ctx.left_width)
    if ctx.needs_input_grad[1]:
        (x,) = ctx.saved_tensors
        dx = _backward(dy.narrow(-1, ctx.left_width, x.shape[-1]), x)
    return dleft, dx


def _backward_kernel(dy: Tensor, x: Tensor) -> Tensor:
    return select(_ROOM, x).backward(dy, x)


def _fake_backward(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_forward = define(
    "gelu_tanh(Tensor x) -> Tensor",
    _forward_kernel,
    _fake_forward,
    save=_save,
    gradients=_gradients,
)
_forward_out = define("gelu_tanh_out(Tensor x, Tensor(a!) out) -> ()", _out_kernel, _fake_out)
_concat = define(
    "concat_gelu_tanh(Tensor left, Tensor x) -> Tensor",
    _concat_kernel,
    _fake_concat,
    save=_save_concat,
    gradients=_concat_gradients,
)
_backward = define(
    "gelu_tanh_bwd(Tensor dy, Tensor x) -> Tensor",
    _backward_kernel,
    _fake_backward,
    gradients=refuse_second_derivative("gelu_tanh"),
)


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it"
        )
    if x.dim() == 0:
        raise ValueError(f"{name} must be (..., M), got a tensor without dimensions")


def _check_left(left: Tensor, x: Tensor) -> None:
    if not isinstance(left, Tensor):
        raise TypeError(f"left must be a tensor, got {type(left).__name__}")
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, M), got shape {tuple(x.shape)}")
    if left.dim() != 3 or left.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"left must be (B, L, E) with B and L of x, {tuple(x.shape)}, got {tuple(left.shape)}"
        )
    if left.dtype != x.dtype:
        raise TypeError(f"left must have the dtype of x, {x.dtype}, got {left.dtype}; cast one")
    if left.device != x.device:
        raise ValueError(f"left must be on the device of x, {x.device}, got {left.device}")


def _check_out(out: Tensor, x: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"out must have the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}")
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of x, {x.dtype}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"out must be on the device of x, {x.device}, got {out.device}")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out is for inference: autograd cannot follow a write into it; "
            "leave it out, or use torch.no_grad()"
        )


def _check_memory(x: Tensor, out: Tensor) -> None:
    """Refuse an ``out`` some of whose elements would be written before they are read, or twice."""
    if any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out must not repeat memory, got strides {out.stride()}")
    same = x.data_ptr() == out.data_ptr() and all(
        a == b or size == 1 for a, b, size in zip(x.stride(), out.stride(), x.shape, strict=True)
    )
    if not same and not apart(x, out):
        raise ValueError(
            "out must be x itself or share no memory with it, got views that overlap: "
            f"offsets {x.storage_offset()} and {out.storage_offset()}, strides {x.stride()} and "
            f"{out.stride()}"
        )
