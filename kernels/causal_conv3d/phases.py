"""The kernels that act on a map before its pixels are repeated, and back from their gradients.

A kernel of three taps after doubling, (a, b, c), is two kernels of two taps before it: for even
outputs (a, b + c), which begin one pixel before the output's own, for odd ones (a + b, c), which
begin at it.
"""

from itertools import product

import torch
from torch import Tensor

Factor = tuple[int, int, int]
# First tap and the one behind the last of those that are added up, for each tap of a kernel.
Spans = tuple[tuple[int, int], ...]
_EVEN: Spans = ((0, 1), (1, 3))
_ODD: Spans = ((0, 2), (2, 3))
_AXES = (2, 3, 4)  # of time, rows and columns


def begins_alone(x: Tensor, past: Tensor | None) -> bool:
    """Whether x is one frame that begins a clip, so that all taps in time see that frame."""
    return past is None and x.shape[2] == 1


def sum_in_time(weight: Tensor) -> Tensor:
    """The taps in time added up: (O, C, 1, KH, KW)."""
    return weight.sum(2, keepdim=True, dtype=wide(weight.dtype)).to(weight.dtype)


def phase_weights(weight: Tensor, factor: Factor, continued: bool) -> list[Tensor]:
    """The kernels of the output parities, columns fastest, in the order of the outputs.

    A doubled frame that continues a clip gives the odd output first: only the frame that begins a
    clip is not doubled. Its even output and the odd one before it start at the frame before.
    """
    kernels = [weight.to(wide(weight.dtype))]
    for dim, doubling in zip(_AXES, factor, strict=True):
        if doubling == 2:
            pairs = (_split(kernel, dim) for kernel in kernels)
            swapped = continued and dim == _AXES[0]
            kernels = [k for even, odd in pairs for k in ((odd, even) if swapped else (even, odd))]
    return [kernel.to(weight.dtype) for kernel in kernels]


def phase_spans(taps: tuple[int, ...], factor: Factor) -> list[tuple[Spans, ...]]:
    """Which taps of each axis the taps of the output parities add up, columns fastest.

    taps: of the kernel along each axis, three where that is doubled. The parity is that of the
    output before any swap: see `phase_weights`.
    """
    axes = (
        (_EVEN, _ODD) if doubling == 2 else (each_tap(count),)
        for count, doubling in zip(taps, factor, strict=True)
    )
    return list(product(*axes))


def each_tap(count: int) -> Spans:
    """The spans of a kernel whose taps stay as they are."""
    return tuple((tap, tap + 1) for tap in range(count))


def phase_weights_backward(gradients: list[Tensor], factor: Factor, continued: bool) -> Tensor:
    """The gradient of the weight from those of its phases, in their order and their dtype."""
    for dim, doubling in zip(reversed(_AXES), reversed(factor), strict=True):
        if doubling == 2:
            first, second = gradients[0::2], gradients[1::2]
            even, odd = (second, first) if continued and dim == _AXES[0] else (first, second)
            gradients = [_merge(*pair, dim) for pair in zip(even, odd, strict=True)]
    (gradient,) = gradients
    return gradient


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: fp32, or float64 where the tensors hold it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _split(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    first, middle, last = kernel.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


def _merge(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    (even_first, even_last), (odd_first, odd_last) = even.unbind(dim), odd.unbind(dim)
    taps = even_first + odd_first, even_last + odd_first, even_last + odd_last
    return torch.stack(taps, dim)
