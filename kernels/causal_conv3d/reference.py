"""The causal convolution by its definition: repeat, pad, convolve; backward tap by tap."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

VERIFIED_ON = frozenset({"*"})

Triple = tuple[int, int, int]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Triple, None, None]:
    """Arguments of a typical call."""
    x, weight = torch.zeros(1, 128, 5, 16, 16), torch.zeros(128, 128, 3, 3, 3)
    x = x.to(device, memory_format=torch.channels_last_3d)
    return x, weight.to(device), torch.zeros(128, device=device), (1, 1, 1), None, None


def supports(x: Tensor, *_: object) -> str | None:
    """``None``: the reference answers every call that the op accepts."""
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (B, O, T', H', W'), channels-last."""
    with torch.autocast(x.device.type, enabled=False), full_precision(x):
        clip = x if past is None else torch.cat((past, x), dim=2)
        if scale is not None and shift is not None:
            gain, offset = (v[:, :, None, None, None] for v in (scale, shift))
            clip = F.silu(_wide(clip) * gain + offset).to(x.dtype)
        seen = _seen(clip, _indices(x, weight, past, factor))
        y = F.conv3d(_wide(seen), _wide(weight), None if bias is None else _wide(bias), stride)
        if residual is not None:
            y = y + residual
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Triple,
    past: Tensor | None,
    factor: Triple | None,
    wants: tuple[bool, bool, bool, bool],
) -> Gradients:
    """dx, dweight, dbias and dpast, each where it is wanted."""
    want_x, want_weight, want_bias, want_past = wants
    dx = dweight = dbias = dpast = None
    with torch.autocast(x.device.type, enabled=False):
        wide_dy = _wide(dy)
        clip = x if past is None else torch.cat((past, x), dim=2)
        indices = _indices(x, weight, past, factor)
        if want_x or want_past:
            dclip = _clip_gradient(wide_dy, _wide(weight), stride, clip.shape, indices)
            dclip = dclip.to(x.dtype)
            dpast, dx = (
                part.contiguous(memory_format=torch.channels_last_3d)
                for part in dclip.split((clip.shape[2] - x.shape[2], x.shape[2]), dim=2)
            )
        if want_weight:
            dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            seen = _wide(_seen(clip, indices))
            for tap, part in _taps(seen, weight, dy, stride):
                dweight[(..., *tap)] = torch.einsum("bothw,bcthw->oc", wide_dy, part)
        if want_bias:
            dbias = wide_dy.sum((0, 2, 3, 4)).to(dy.dtype)
    return dx if want_x else None, dweight, dbias, dpast if want_past else None


def _indices(
    x: Tensor, weight: Tensor, past: Tensor | None, factor: Triple | None
) -> tuple[Tensor, ...]:
    """Frames, rows and columns of [past, x] that the kernel slides over, in their order."""
    _, _, frames, height, width = x.shape
    t, h, w = factor or (1, 1, 1)
    lead = weight.shape[2] - 1
    if past is None:
        order = [0] * lead + [0] + [f for f in range(1, frames) for _ in range(t)]
    else:
        order = [f for f in range(past.shape[2] + frames) for _ in range(t)]
        if factor is not None:
            order = ([0] * lead + order)[-(lead + frames * t) :]
    rows, columns = (
        torch.arange(-(taps // 2), size * times + taps // 2).clamp(0, size * times - 1) // times
        for taps, size, times in zip(weight.shape[3:], (height, width), (h, w), strict=True)
    )
    return tuple(index.to(x.device) for index in (torch.tensor(order), rows, columns))


def _seen(clip: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    for dim, index in enumerate(indices, 2):
        clip = clip.index_select(dim, index)
    return clip


def _taps(
    seen: Tensor, weight: Tensor, dy: Tensor, stride: Triple
) -> Iterator[tuple[Triple, Tensor]]:
    """The taps of the kernel, and what of ``seen`` each of them meets: a view like dy."""
    for tap in torch.ones(weight.shape[2:]).nonzero().tolist():
        t, h, w = (
            slice(first, first + (n - 1) * step + 1, step)
            for first, n, step in zip(tap, dy.shape[2:], stride, strict=True)
        )
        yield tuple(tap), seen[:, :, t, h, w]


def _clip_gradient(
    dy: Tensor, weight: Tensor, stride: Triple, shape: torch.Size, indices: tuple[Tensor, ...]
) -> Tensor:
    """The gradient of [past, x], from those of all places where each value is seen."""
    gradient = dy.new_zeros((*shape[:2], *map(len, indices)))
    for tap, part in _taps(gradient, weight, dy, stride):
        part += torch.einsum("bothw,oc->bcthw", dy, weight[(..., *tap)])
    for dim, index in reversed(list(enumerate(indices, 2))):
        smaller = list(gradient.shape)
        smaller[dim] = shape[dim]
        gradient = dy.new_zeros(smaller).index_add_(dim, index, gradient)
    return gradient


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Convolutions of fp32 on x's device multiply fp32, not numbers cut to TF32.

    TF32 is torch's default for cuDNN's convolutions. It keeps ten bits, and its 3D kernels were
    wrong as well from 9.10.2 to 9.15.
    """
    if x.device.type != "cuda":
        yield
        return
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
