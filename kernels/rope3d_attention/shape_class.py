"""Which calls are alike, so that what was measured of one holds for the others."""

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

# dtype, head_dim, octave of the length, whether there are lengths, whether gradients are wanted
ShapeClass = tuple[torch.dtype, int, int, bool, bool]

# How many octaves of the length a measurement speaks for, either way, where there is none nearer.
_REACH = 2


def shape_class(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> ShapeClass:
    """The class of a call; backward, whose tensors want gradients too, has that of its forward.

    Queries of their own are as queries of the keys' tokens with as many scores.
    """
    _, length, _, head_dim = q.shape
    if q_len is not None:
        length, kv_len = isqrt(length * k.shape[1]), q_len
    training = q.requires_grad or k.requires_grad or v.requires_grad
    return q.dtype, head_dim, length.bit_length(), kv_len is not None, training


def neighbours(measured: ShapeClass) -> Iterator[ShapeClass]:
    """Classes that a measurement also speaks for, the nearest first, of two the shorter calls."""
    dtype, head_dim, octave, *rest = measured
    for distance in range(1, _REACH + 1):
        for other in (octave - distance, octave + distance):
            yield dtype, head_dim, other, *rest  # type: ignore[misc]
