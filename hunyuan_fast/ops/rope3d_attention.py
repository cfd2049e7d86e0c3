"""Joint video and text attention.

Formula and contract: ``hunyuan_fast.kernels.rope3d_attention``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hunyuan_fast.dispatch import select
from hunyuan_fast.kernels.rope3d_attention import reference
from hunyuan_fast.ops.attention_checks import (
    check_kv_len,
    check_lengths,
    check_out,
    check_tensors,
)
from hunyuan_fast.ops.attention_results import fake_backward, fake_forward, fake_out
from hunyuan_fast.ops.memory import check_apart
from hunyuan_fast.ops.operator import define, refuse_second_derivative

if TYPE_CHECKING:
    from hunyuan_fast.ops.sliding_tile_attention import SlidingTiles

_ROOM = "rope3d_attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor | None = None,
    q_len: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    pattern: "SlidingTiles | None" = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Non-causal attention of every sample over its own valid prefix.

    q, k, v: (B, L, N, D), one floating-point dtype, any strides.
    kv_len: (B,) int32 or int64, the number of valid tokens of each sample, 0 to L; ``None``: all.
        Tokens past it take no part: their outputs and gradients are zero, and what they hold, NaN
        included, has no effect.
    q_len: (B,) as kv_len: queries of their own, which ask the keys of other tokens. q is then
        (B, Lq, N, D) beside k and v (B, Lk, N, D), and of a sample the first ``q_len`` queries see
        the first ``kv_len`` keys. Rows past ``q_len`` are padding as above; so are all rows of a
        sample without keys. ``None``: queries are those of the tokens of the keys.
    scale: factor of the scores, 1/sqrt(D) when ``None``.
    out: (B, L, N, D) to write into, of any strides (a view beside other results, say), sharing
        no memory with q, k or v; inference only.
    return_lse: also return the natural log-sum-exp of the scaled scores, (B, N, L) fp32 (fp64 for
        fp64 inputs), -inf for padding. It carries no gradient.
    pattern: who sees whom among the valid tokens, ``SlidingTiles(...)``; ``None``: everybody.

    Returns (B, L, N, D), or that and the log-sum-exp.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit, and ValueError for
    lengths outside [0, L] (lengths on a GPU are not looked at: the host would have to wait), for
    an ``out`` over q, k or v, and for a pattern beside ``q_len``.
    """
    if pattern is not None:
        if q_len is not None:
            raise ValueError("q_len is for attention without a pattern: leave one of them out")
        options: dict[str, Any] = {"kv_len": kv_len, "scale": scale, "out": out}
        return pattern.attend(q, k, v, **options, return_lse=return_lse)
    check_tensors(q, k, v, q_len)
    if kv_len is not None:
        check_kv_len(kv_len, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    own = () if q_len is None else (q_len,)
    if out is None:
        out, lse = _forward(q, k, v, kv_len, scale, *own)
    else:
        check_out(out, q, k, v)
        lse = _forward_out(q, k, v, kv_len, scale, out, *own)
    return (out, lse) if return_lse else out


def apply_rope3d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the video tokens, the first ``len(cos)`` ones, of x by their three-axis positions.

    x: (B, L, N, D); cos, sin: (num_video_tokens, D), each angle repeated for features 2i, 2i + 1.
    Computed in fp32 and rounded once; text tokens are returned as they are. Differentiable in x.
    Technical report, section 4.2. Raises ValueError when the shapes do not fit.
    """
    _check_tables(x, cos, sin)
    return reference.apply_rope3d(x, cos, sin)


def rope3d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_video_tokens: int,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate the video tokens of q and k, then :func:`attention` over video and text together.

    q, k, v: (B, L, N, D), video tokens first; cos, sin: (num_video_tokens, D), as in
    :func:`apply_rope3d`; the rest as in :func:`attention`.
    """
    if cos.shape[0] != num_video_tokens:
        raise ValueError(
            f"cos must have one row per video token, num_video_tokens is {num_video_tokens}, "
            f"got shape {tuple(cos.shape)}"
        )
    q, k = (apply_rope3d(x, cos, sin) for x in (q, k))
    return attention(q, k, v, kv_len=kv_len, scale=scale, out=out, return_lse=return_lse)


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_lengths(kv_len, k.shape[1])
    if q_len is None:
        return select(_ROOM, q, k, v, kv_len, scale).forward(q, k, v, kv_len, scale)
    return _own_queries(q, k, v, kv_len, scale, None, q_len)


def _own_queries(*args: Any) -> tuple[Tensor, Tensor]:
    q, *_, q_len = args
    check_lengths(q_len, q.shape[1], "q_len")
    return select(_ROOM, *args).forward(*args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_len, ctx.scale, *own = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, q, k, v, kv_len, *own)


def _gradients(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None, None
    out, lse, q, k, v, kv_len, *own = ctx.saved_tensors
    return *attention_backward(dout, out, lse, q, k, v, kv_len, ctx.scale, *own), None, None, None


def _out_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor,
    q_len: Tensor | None = None,
) -> Tensor:
    check_lengths(kv_len, k.shape[1])
    check_apart(out, q=q, k=k, v=v)
    if q_len is None:
        return select(_ROOM, q, k, v, kv_len, scale, out).forward(q, k, v, kv_len, scale, out)[1]
    return _own_queries(q, k, v, kv_len, scale, out, q_len)[1]


def _backward_kernel(
    dout: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    args: Sequence[Any] = rest
    if len(args) > _PLAIN:
        *args, q_len = args
        if q_len is not None:
            impl = select(_ROOM, *args, None, q_len)
            return impl.backward(dout, out, lse, *args, q_len)
    return select(_ROOM, *args).backward(dout, out, lse, *args)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? kv_len, float scale"
_PLAIN = 5  # so many arguments
# Last and with a default: a call without it is not longer than it has to be.
_OWN = "Tensor? q_len=None"
_forward = define(
    f"attention({_ARGUMENTS}, {_OWN}) -> (Tensor, Tensor)",
    _forward_kernel,
    fake_forward,
    save=_save,
    gradients=_gradients,
)
_forward_out = define(
    f"attention_out({_ARGUMENTS}, Tensor(a!) out, {_OWN}) -> Tensor", _out_kernel, fake_out
)
# What ring attention, which computes in parts, calls itself.
attention_backward = define(
    f"attention_bwd(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}, {_OWN})"
    " -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake_backward,
    gradients=refuse_second_derivative("attention"),
)


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be (B, L, N, D) with D even, got shape {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != x.shape[-1] or table.shape[0] > x.shape[1]:
            raise ValueError(
                f"{name} must be (num_video_tokens, D) with at most {x.shape[1]} rows "
                f"and D = {x.shape[-1]}, got {tuple(table.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
