"""Packed projections to joint heads in plain PyTorch: the specification of the others."""

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})
Tables = tuple[Tensor, Tensor]


def example(
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, None, None, None, float]:
    """Arguments of a typical call."""
    qkv = torch.zeros(1, 64, 3 * 24 * 128, dtype=torch.bfloat16, device=device)
    weight = torch.ones(128, dtype=torch.bfloat16, device=device)
    table = torch.zeros(48, 128, device=device)
    return qkv, weight, weight, table, table, 24, None, None, None, 1e-6


def supports(*_: object) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(
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
    *,
    with_q: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q, k, v of the joint sequence, each (B, L, N, D)."""
    with _no_autocast(qkv):
        streams = [(qkv, q_weight, k_weight, _tables(cos, sin, qkv.dtype))]
        if text_qkv is not None:
            assert text_q_weight is not None and text_k_weight is not None
            streams.append((text_qkv, text_q_weight, text_k_weight, None))
        parts = [_stream(*stream, num_heads, eps, with_q) for stream in streams]
        q, k, v = (
            None if part[0] is None else torch.cat(part, dim=1) for part in zip(*parts, strict=True)
        )
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dqkv (B, L, 3ND), dtext_qkv like text_qkv, and the gradients of the weights, (2 or 4, D)."""
    heads, length = (dq, dk, dv), qkv.shape[1]
    with _no_autocast(qkv):
        tables = _tables(cos, -sin, qkv.dtype)  # back by the same angles
        video = [d[:, :length] for d in heads]
        dqkv, *dweights = _stream_backward(video, qkv, q_weight, k_weight, tables, num_heads, eps)
        if text_qkv is None:
            return dqkv, None, torch.stack(dweights)
        assert text_q_weight is not None and text_k_weight is not None
        text = [d[:, length:] for d in heads]
        dtext_qkv, *dtext_weights = _stream_backward(
            text, text_qkv, text_q_weight, text_k_weight, None, num_heads, eps
        )
        return dqkv, dtext_qkv, torch.stack([*dweights, *dtext_weights])


def _stream(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    tables: Tables | None,
    heads: int,
    eps: float,
    with_q: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q, k, v of one stream, whose first rows the tables rotate."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    turned = [
        _rotate(_normalise(x, eps)[0] * _wide(weight), tables).to(qkv.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))[not with_q :]
    ]
    return turned[0] if with_q else None, turned[-1], v


def _stream_backward(
    gradients: list[Tensor],
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    tables: Tables | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv of one stream, and the gradients of its two weights."""
    *xs, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    *dys, dv = gradients
    dxs, dweights = [], []
    for x, dy, weight in zip(xs, dys, (q_weight, k_weight), strict=True):
        normed, rstd = _normalise(x, eps)
        turned = _rotate(_wide(dy), tables)
        g = turned * _wide(weight)
        dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
        dxs.append(dx.to(qkv.dtype))
        dweights.append((turned * normed).sum((0, 1, 2)))
    return torch.stack([*dxs, dv], dim=2).flatten(2), *dweights


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, L, N, D) over its root mean square, and what it was multiplied with, (B, L, N, 1)."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def _rotate(y: Tensor, tables: Tables | None) -> Tensor:
    """The pairs of the first rows turned by their angles; the other rows as they are."""
    if tables is None:
        return y
    cos, sin = tables
    even, odd = y[:, : cos.shape[0]].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, y[:, cos.shape[0] :]), dim=1)


def _tables(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tables:
    """The angles of every video row and pair, (L_video, 1, D / 2)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = (table[:, None, 0::2].to(wide) for table in (cos, sin))
    return cos, sin


def _no_autocast(qkv: Tensor) -> torch.autocast:
    """Inside of an autocast to bf16, torch.cat refuses tensors of fp16."""
    return torch.autocast(qkv.device.type, enabled=False)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
