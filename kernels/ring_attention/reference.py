"""The merge of two partial attentions in plain PyTorch: the specification."""

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"*"})


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of a typical call."""
    out = torch.zeros(1, 64, 24, 128, device=device)
    lse = torch.zeros(1, 24, 64, device=device)
    return out, lse, out.to(torch.bfloat16), lse


def supports(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, in_place: bool = False
) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """The merged out (B, L, N, D) and lse (B, N, L); in their places if that is wanted."""
    both = torch.stack((lse, part_lse))
    first, second = _rows(_shares(both))
    merged = torch.where(first != 0, first * out, 0) + torch.where(
        second != 0, second * part.to(out.dtype), 0
    )
    merged_lse = torch.logsumexp(both, 0)
    if in_place:
        return out.copy_(merged), lse.copy_(merged_lse)
    return _new(merged), _new(merged_lse)


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out, lse, part and part_lse as they were before the merge."""
    shares = _shares(torch.stack((lse, part_lse)))
    first, second = _rows(shares)
    dout = dout.to(out.dtype)
    inside = (first != 0) & (second != 0)
    difference = torch.where(inside, out - part.to(out.dtype), 0)
    delta = (dout * difference).sum(-1).transpose(1, 2)
    through = shares[0] * shares[1] * delta
    if dlse is None:
        dlse = torch.zeros_like(lse)
    counted = torch.where(shares != 0, shares * dlse, 0)
    dpart = torch.where(second != 0, second * dout, 0).to(part.dtype)
    return (
        _new(torch.where(first != 0, first * dout, 0)),
        _new(counted[0] + through),
        _new(dpart),
        _new(counted[1] - through),
    )


def _shares(both: Tensor) -> Tensor:
    """How much of each row is of either part: (2, B, N, L), zero where it has seen nothing."""
    most = both.amax(0).nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)
    weights = torch.exp(both - most)
    total = weights.sum(0)
    return torch.where(total == 0, 0, weights / total)


def _rows(shares: Tensor) -> Tensor:
    """The same beside out: (2, B, L, N, 1)."""
    return shares.transpose(2, 3)[..., None]


def _new(x: Tensor) -> Tensor:
    return x.contiguous()
