"""Inputs that find faults: values far from N(0, 1), and memory layouts far from contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Scale and offset of a normal distribution. Only a large offset shows padding lanes that enter a
# variance; only tiny values show a wrong epsilon.
FAMILIES = {
    "normal": (1.0, 0.0),
    "offset_10": (1.0, 10.0),
    "tiny": (1e-3, 0.0),
    "offset_1000": (1.0, 1000.0),
}

LAYOUTS = ("transposed", "sliced", "expanded", "offset_by_one")


def draw(
    family: str,
    shape: Sequence[int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A tensor of one of the ``FAMILIES``, rounded to ``dtype``."""
    scale, offset = FAMILIES[family]
    return (torch.randn(shape, generator=generator) * scale + offset).to(dtype)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """x (two dimensions or more) in an awkward layout; equal values, except for ``expanded``.

    transposed: dimensions 0 and 1 swapped in memory.  sliced: rows (last dimension) with room
    between them, beside foreign data.  expanded: x[:1] repeated by a stride of 0.
    offset_by_one: contiguous, but starting one element past an aligned address.
    """
    match layout:
        case "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "sliced":
            room = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan)
            view = room[..., 2 : 2 + x.shape[-1]]
            return view.copy_(x)
        case "expanded":
            return x[:1].clone().expand_as(x)
        case "offset_by_one":
            room = x.new_full((x.numel() + 1,), torch.nan)
            return room[1:].view(x.shape).copy_(x)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
