"""Group norm and SiLU of the VAE's feature maps, against the two operations of torch."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Case, Peer, Work, compiled
from hunyuan_fast.ops import group_norm_silu

_EPS = 1e-6


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Maps of the decoder, from the widest to the finest, at sizes that a device is used for."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [_case(device, shapes.MAPS_QUICK, dtype) for dtype in (fp32, bf16)]
    if device.type == "cuda":
        return [_case(device, maps, bf16) for maps in (shapes.MAPS_FINE, shapes.MAPS_WIDE)]
    return [
        _case(device, shapes.MAPS_FINE, fp32),
        _case(device, shapes.MAPS_WIDE, fp32, alternating=True),
        _case(device, shapes.MAPS_WIDE, bf16),
        _case(device, shapes.MAPS_NANO, fp32, cold=False),
    ]


def _case(
    device: torch.device,
    maps: shapes.Maps,
    dtype: torch.dtype,
    *,
    cold: bool = True,
    alternating: bool = False,
) -> Case:
    tensor = torch.Size(maps.shape).numel() * dtype.itemsize

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = (maps.shape, maps.shape[1:2], maps.shape[1:2])
        x, *vectors = (
            torch.randn(s, generator=generator, device=generator.device).to(dtype) for s in sizes
        )
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return tuple(t.requires_grad_() for t in (x, *vectors))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, maps.groups, weight, bias, eps=_EPS)

    def arguments(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[object, ...]:
        return x, maps.groups, weight, bias, _EPS, True, None

    eager = partial(_eager, maps.groups)
    contiguous = partial(_contiguous, maps.groups)
    return Case(
        name=maps.name,
        function="group_norm_silu",
        dtype=dtype,
        shape=dict(zip("BCTHW", maps.shape, strict=True)),
        inputs=inputs,
        call=ours,
        arguments=arguments,
        # x, which no cache holds, is read twice and y written; then x and dy read twice, dx written
        work={FORWARD: Work(3 * tensor), TRAINING: Work(8 * tensor)},
        peers=(
            Peer("eager", lambda: eager),
            Peer("eager, contiguous", lambda: contiguous),
            Peer("torch.compile", compiled(eager)),
        ),
        cold=cold,
        alternating=alternating,
    )


def _eager(groups: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, _EPS))


def _contiguous(groups: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With a copy to the layout for which torch's group norm is more exact, as convolutions of
    that layout would leave it."""
    return F.silu(F.group_norm(x.contiguous(), groups, weight, bias, _EPS))
