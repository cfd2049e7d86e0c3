"""Gated residual sum and adaptive layer norm in plain PyTorch: what the other files must equal."""

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """Arguments of a typical call."""
    x = torch.zeros(1, 64, 3072, dtype=torch.bfloat16, device=device)
    return x, x[:, 0], x[:, 1], 1e-6


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """residual and modulated (B, L, E), and stats (2, B, L): mean and rstd of every row."""
    residual = modulated = stats = None
    if gate is not None and y is not None:
        residual = (_wide(x) + _of_tokens(gate, index) * _wide(y)).to(x.dtype).contiguous()
        x = residual
    if shift is not None and scale is not None:
        wide = _wide(x)
        mean = wide.mean(-1)
        centred = wide - mean[..., None]
        rstd = torch.rsqrt(centred.square().mean(-1) + eps)
        normed = centred * rstd[..., None]
        modulated = normed * (1 + _of_tokens(scale, index)) + _of_tokens(shift, index)
        modulated = modulated.to(x.dtype).contiguous()
        stats = torch.stack((mean, rstd))
    return residual, modulated, stats


def backward(
    dmodulated: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    dresidual: Tensor | None = None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dshift, dscale, dy and dgate; stats as forward returned them."""
    dx = dshift = dscale = dy = dgate = None
    total = None if dresidual is None else _wide(dresidual)
    if dmodulated is not None and residual is not None and scale is not None and stats is not None:
        gradient, (mean, rstd) = _wide(dmodulated), stats[..., None]
        normed = (_wide(residual) - mean) * rstd
        g = gradient * (1 + _of_tokens(scale, index))
        projected = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
        through = projected * rstd
        total = through if total is None else total + through
        dx = total.to(residual.dtype).contiguous()
        dshift = _over_tokens(gradient, scale, index)
        dscale = _over_tokens(gradient * normed, scale, index)
    if gate is not None and total is not None:
        if y_dtype is not None:
            dy = (_of_tokens(gate, index) * total).to(y_dtype).contiguous()
        if y is not None:
            dgate = _over_tokens(total * _wide(y), gate, index)
    return dx, dshift, dscale, dy, dgate


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _of_tokens(vectors: Tensor, index: Tensor | None) -> Tensor:
    """The vector of every token: (B, 1, E) for all alike, or (B, L, E)."""
    if index is None:
        return _wide(vectors)[:, None]
    samples = torch.arange(len(vectors), device=vectors.device)[:, None]
    return _wide(vectors)[samples, index]


def _over_tokens(rows: Tensor, vectors: Tensor, index: Tensor | None) -> Tensor:
    """The sum of the rows (B, L, E) that met each vector, in the shape and dtype of ``vectors``.

    Not by index_add, whose order of additions on a GPU is left to chance.
    """
    if index is None:
        return rows.sum(1).to(vectors.dtype)
    sums = [torch.where((index == m)[..., None], rows, 0).sum(1) for m in range(vectors.shape[1])]
    return torch.stack(sums, 1).to(vectors.dtype)
