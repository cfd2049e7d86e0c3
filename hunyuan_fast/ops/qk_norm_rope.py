"""From packed projections to the heads of joint attention in one pass.

Formula and contract: ``hunyuan_fast.kernels.qk_norm_rope``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "qk_norm_rope"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    text_qkv: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed projections into heads, RMS-normalise q and k, rotate their video rows, join.

    qkv: (B, L, 3ND), features ordered (q, k or v; head; feature), of any strides: it may be the
        first columns of a wider result. fp32, bf16, fp16; float64 is computed in float64.
    q_weight, k_weight: (D,), D even; of any dtype but float64, which goes with float64 qkv only.
    cos, sin: (L_video, D), fp32, features 2i and 2i + 1 sharing an angle (only the even ones are
        read), or float64 with float64 qkv. They have no gradient.
    num_heads: N.
    text_qkv: in one stream ``None``: the first L_video rows of qkv are video, the others text,
        which is normalised and not rotated. In two streams the text rows (B, L_text, 3ND), in the
        dtype of qkv, which then holds the video rows alone; they follow the video in the results.
    text_q_weight, text_k_weight: the weights of text_qkv, given with it.

    Returns q, k and v of the joint sequence, each (B, L, N, D), contiguous, in the dtype of qkv,
    under autocast too: computed in fp32 and rounded once. Padding is a row like any other: what it
    holds, NaN included, stays in that row of the results and of the gradients of qkv and text_qkv,
    but the gradients of the weights are sums over all rows. Gradients come in the dtype of their
    tensor; a second derivative is refused.
    Raises TypeError or ValueError when shapes, dtypes, devices, num_heads or eps do not fit.
    """
    text = text_qkv, text_q_weight, text_k_weight
    check_arguments(qkv, q_weight, k_weight, cos, sin, num_heads, *text, eps)
    return _forward(qkv, q_weight, k_weight, cos, sin, num_heads, *text, float(eps))


def check_arguments(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    eps: float,
) -> None:
    """Raise TypeError or ValueError when shapes, dtypes, devices, num_heads or eps do not fit."""
    _check_packed("qkv", qkv)
    head_dim = _head_dim(qkv, num_heads)
    _check_weight("q_weight", q_weight, head_dim, qkv)
    _check_weight("k_weight", k_weight, head_dim, qkv)
    _check_table("cos", cos, head_dim, qkv, text_qkv)
    _check_table("sin", sin, head_dim, qkv, text_qkv)
    if cos.shape != sin.shape:
        raise ValueError(
            f"sin must have the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    if text_qkv is not None:
        _check_text(text_qkv, qkv)
        _check_weight("text_q_weight", text_q_weight, head_dim, qkv)
        _check_weight("text_k_weight", text_k_weight, head_dim, qkv)
    elif text_q_weight is not None or text_k_weight is not None:
        raise ValueError("text_q_weight and text_k_weight go with text_qkv, got None for it")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")


# What forward takes, and backward behind the gradients of q, k and v.
ARGUMENTS = (
    "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, SymInt num_heads, "
    "Tensor? text_qkv, Tensor? text_q_weight, Tensor? text_k_weight, float eps"
)


def _forward_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return select(_ROOM, *args).forward(*args)


def _backward_kernel(
    dq: Tensor, dk: Tensor, dv: Tensor, *args: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    return select(_ROOM, *args).backward(dq, dk, dv, *args)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    qkv, q_weight, _, _, _, num_heads, text_qkv, *_ = args
    batch, length, _width = qkv.shape
    if text_qkv is not None:
        length = length + text_qkv.shape[1]
    shape = (batch, length, num_heads, q_weight.shape[0])
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


def _fake_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, *args: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    qkv, q_weight, _, _, _, _, text_qkv, *_ = args
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    weights = 2 if text_qkv is None else 4
    dtext_qkv = None if text_qkv is None else qkv.new_empty(text_qkv.shape)
    dweights = qkv.new_empty((weights, q_weight.shape[0]), dtype=dtype)
    return qkv.new_empty(qkv.shape), dtext_qkv, dweights


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads, text_qkv, text_q_weight, text_k_weight, ctx.eps = inputs
    ctx.save_for_backward(*tensors, text_qkv, text_q_weight, text_k_weight)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, text_qkv, text_q_weight, text_k_weight = ctx.saved_tensors
    text = text_qkv, text_q_weight, text_k_weight
    dqkv, dtext_qkv, dweights = _backward(dq, dk, dv, *tensors, ctx.num_heads, *text, ctx.eps)
    weights = tensors[1], tensors[2], text_q_weight, text_k_weight
    needed = ctx.needs_input_grad
    dq_weight, dk_weight, dtext_q_weight, dtext_k_weight = (
        dweights[row].to(weights[row].dtype) if needed[index] else None
        for row, index in enumerate((1, 2, 7, 8))
    )
    dqkv = dqkv if needed[0] else None
    dtext_qkv = dtext_qkv if needed[6] else None
    text = dtext_qkv, dtext_q_weight, dtext_k_weight
    return dqkv, dq_weight, dk_weight, None, None, None, *text, None


_forward = define(
    f"qk_norm_rope({ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _forward_kernel,
    _fake_forward,
    save=_save,
    gradients=_gradients,
)
_backward = define(
    f"qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor dv, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _fake_backward,
    gradients=refuse_second_derivative("qk_norm_rope"),
)


def _check_tensor(name: str, t: Tensor | None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}; cast it"
        )


def _check_device(name: str, t: Tensor, qkv: Tensor) -> None:
    if t.device != qkv.device:
        raise ValueError(f"{name} must be on the device of qkv, {qkv.device}, got {t.device}")


def _check_packed(name: str, qkv: Tensor) -> None:
    _check_tensor(name, qkv)
    if qkv.dim() != 3:
        raise ValueError(f"{name} must be (B, L, 3ND), got shape {tuple(qkv.shape)}")


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an integer, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    width = qkv.shape[2]
    if width == 0 or width % (6 * num_heads):
        raise ValueError(
            f"the last dimension of qkv must be 3 x num_heads x D with D even, a multiple of "
            f"{6 * num_heads} for num_heads = {num_heads}, got shape {tuple(qkv.shape)}"
        )
    return width // (3 * num_heads)


def _check_weight(name: str, weight: Tensor | None, head_dim: int, qkv: Tensor) -> None:
    _check_tensor(name, weight)
    assert weight is not None
    if weight.shape != (head_dim,):
        raise ValueError(f"{name} must be (D,) = ({head_dim},), got shape {tuple(weight.shape)}")
    if (weight.dtype == torch.float64) != (qkv.dtype == torch.float64):
        raise TypeError(
            f"{name} and qkv must both be float64 or neither, got {weight.dtype} and {qkv.dtype}"
        )
    _check_device(name, weight, qkv)


def _check_table(
    name: str, table: Tensor, head_dim: int, qkv: Tensor, text_qkv: Tensor | None
) -> None:
    _check_tensor(name, table)
    if table.dtype != torch.float32 and not table.dtype == qkv.dtype == torch.float64:
        raise TypeError(
            f"{name} must be float32, or float64 for qkv in float64, got {table.dtype}; cast it"
        )
    if table.dim() != 2 or table.shape[1] != head_dim:
        raise ValueError(
            f"{name} must be (L_video, D) with D = {head_dim}, got shape {tuple(table.shape)}"
        )
    rows, length = table.shape[0], qkv.shape[1]
    if text_qkv is None and rows > length:
        raise ValueError(f"{name} must have at most L = {length} rows, as qkv has, got {rows}")
    if text_qkv is not None and rows != length:
        raise ValueError(
            f"{name} must have one row for each of the L = {length} rows of qkv, all video beside "
            f"text_qkv, got {rows}"
        )
    if table.requires_grad:
        raise ValueError(f"{name} must not require a gradient: qk_norm_rope has none for it")
    _check_device(name, table, qkv)


def _check_text(text_qkv: Tensor, qkv: Tensor) -> None:
    _check_packed("text_qkv", text_qkv)
    if text_qkv.dtype != qkv.dtype:
        raise TypeError(
            f"text_qkv must have the dtype of qkv, {qkv.dtype}, got {text_qkv.dtype}; cast it"
        )
    if text_qkv.shape[0] != qkv.shape[0] or text_qkv.shape[2] != qkv.shape[2]:
        raise ValueError(
            f"text_qkv must be (B, L_text, 3ND) with the B and 3ND of qkv, {tuple(qkv.shape)}, "
            f"got {tuple(text_qkv.shape)}"
        )
    _check_device("text_qkv", text_qkv, qkv)
