"""Attention in which no frame of a clip sees a later one.

Formula and contract: ``hunyuan_fast.kernels.frame_causal_attention``.
"""

from typing import Any

from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.ops.attention_results import fake_backward, fake_forward
from hunyuan_fast.ops.operator import define, refuse_second_derivative

_ROOM = "frame_causal_attention"


def frame_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens_per_frame: int,
    query_tokens_per_frame: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention where a token sees every token of its own frame and of earlier frames.

    q: (B, Lq, N, D); k, v: (B, Lk, N, D), frame by frame, one floating-point dtype, any strides.
        Lk may be larger than Lq: the queries are then the last frames of the clip that k and v
        hold. Both are multiples of tokens_per_frame.
    query_tokens_per_frame: how many queries a frame has, where they are not as many as its keys:
        a part of every frame, say. Lq is a multiple of it, and 0 where it is 0.
    scale: factor of the scores, 1/sqrt(D) when ``None``.

    Returns (B, Lq, N, D). No mask is built, and memory grows linearly with the number of tokens.
    What a later frame holds, NaN included, does not reach the outputs of earlier ones.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    _check_tensors(q, k, v)
    _check_frames(q, k, tokens_per_frame, query_tokens_per_frame)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    own = () if query_tokens_per_frame is None else (query_tokens_per_frame,)
    out, _ = _forward(q, k, v, tokens_per_frame, scale, *own)
    return out


def _forward_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    return select(_ROOM, *args).forward(*args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.numbers = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, q, k, v)


def _gradients(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None, None
    return *_backward(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None


def _backward_kernel(
    dout: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return select(_ROOM, *args).backward(dout, out, lse, *args)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, SymInt tokens_per_frame, float scale, SymInt? query_tokens=None"
)
_forward = define(
    f"{_ROOM}({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward_kernel,
    fake_forward,
    save=_save,
    gradients=_gradients,
)
_backward = define(
    f"{_ROOM}_bwd(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake_backward,
    gradients=refuse_second_derivative(_ROOM),
)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B, L, N, D), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}; cast it")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if not q.is_floating_point():
        raise TypeError(f"q must hold floating-point numbers, got {q.dtype}")
    if q.shape[-1] == 0:
        raise ValueError(f"the head dimension D must be at least 1, got shape {tuple(q.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            "k must have the batch, heads and head dimension of q, "
            f"{tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")


def _check_frames(
    q: Tensor, k: Tensor, tokens_per_frame: int, query_tokens_per_frame: int | None
) -> None:
    if query_tokens_per_frame is None:
        asking = tokens_per_frame
        _check_whole("q", q, "tokens_per_frame", asking)
    else:
        asking = query_tokens_per_frame
        _check_whole("q", q, "query_tokens_per_frame", asking, least=0)
    _check_whole("k", k, "tokens_per_frame", tokens_per_frame)
    if asking and q.shape[1] // asking > k.shape[1] // tokens_per_frame:
        raise ValueError(
            f"k must hold at least as many frames as q, {q.shape[1] // asking}, got "
            f"{k.shape[1] // tokens_per_frame}"
        )


def _check_whole(name: str, x: Tensor, of_what: str, tokens: int, least: int = 1) -> None:
    if isinstance(tokens, (bool, float)):
        raise TypeError(f"{of_what} must be an int, got {tokens!r}")
    if tokens < least or (x.shape[1] % tokens if tokens else x.shape[1]):
        raise ValueError(f"{name} must hold whole frames of {of_what} = {tokens}, got {x.shape[1]}")
