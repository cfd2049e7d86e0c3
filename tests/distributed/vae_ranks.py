"""What the ranks do in the tests of the VAE across processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_fast.distributed.halos import Exchange, Strips
from hunyuan_fast.distributed.traffic import Traffic, count_traffic
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae import parallel
from hunyuan_fast.models.vae.cut import Cut
from hunyuan_fast.models.vae.tiling import Tiling
from tests.models.vae_cases import clip, tiny_vae
from tests.models.vae_memory import LiveBytes

# Batch, frames, rows and columns of latents.
Shape = tuple[int, int, int, int]
# Largest value, and largest difference.
Difference = tuple[float, float]


def one_vae(dtype: torch.dtype = torch.float32, **changes: Any) -> HunyuanVideoVAE:
    """The same on all ranks; a milder attention, that roundings before it do not grow large."""
    vae = tiny_vae(torch.Generator().manual_seed(0), **changes)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "to_q" in name:
                parameter.mul_(0.25)
    return vae.to(dtype).requires_grad_(False).eval()


def inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A clip and latents of its size, the same on all ranks."""
    batch, frames, height, width = shape
    generator = torch.Generator().manual_seed(1)
    video = clip(generator, batch, 3, frames, 8 * height, 8 * width)
    z = torch.randn(batch, 4, (frames - 1) // 4 + 1, height, width, generator=generator)
    return {"encode": video.to(dtype), "decode": z.to(dtype)}


def call(vae: HunyuanVideoVAE, half: str, x: Tensor, group: Any = None) -> Tensor:
    """Mean and log variance, or pixels."""
    if half == "decode":
        return vae.decode(x, group=group)
    posterior = vae.encode(x, group=group)
    return torch.cat((posterior.mean, posterior.logvar), dim=1)


def compared(vae: HunyuanVideoVAE, half: str, x: Tensor, group: Any) -> Difference | None:
    """What the group has against what its first process has alone, which only that one says.

    All must have the same bits.
    """
    shared = call(vae, half, x, group)
    first = shared.clone(memory_format=torch.contiguous_format)
    dist.broadcast(first, group=group, group_src=0)
    assert torch.equal(first, shared)
    if group.rank():
        return None
    alone = call(vae, half, x)
    assert alone.shape == shared.shape and alone.dtype == shared.dtype
    return alone.abs().max().item(), (alone - shared).abs().max().item()


@torch.no_grad()
def differences(
    shapes: list[Shape],
    dtype: torch.dtype,
    changes: dict[str, Any] | None = None,
    members: list[int] | None = None,
) -> list[Difference | None]:
    """Of moments and of pixels, for each shape; members: the group, if that is not all ranks."""
    group = dist.group.WORLD if members is None else dist.new_group(members)
    if members is not None and dist.get_rank() not in members:
        return []
    vae = one_vae(dtype, **(changes or {}))
    return [
        compared(vae, half, x, group)
        for shape in shapes
        for half, x in inputs(shape, dtype).items()
    ]


@torch.no_grad()
def errors_in_bf16(shapes: list[Shape], autocast: bool) -> list[tuple[float, float]]:
    """Root mean squares of alone and shared minus float64, for each shape and half."""
    found = []
    wide, narrow = one_vae(torch.float64), one_vae()
    if not autocast:
        narrow = narrow.to(torch.bfloat16)
        wide.load_state_dict(narrow.state_dict())
    for shape in shapes:
        for half, x in inputs(shape, torch.bfloat16).items():
            truth = call(wide, half, x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                results = [call(narrow, half, x, group) for group in (None, dist.group.WORLD)]
            assert all(y.dtype == torch.bfloat16 for y in results)
            alone, shared = ((y - truth).square().mean().sqrt().item() for y in results)
            found.append((alone, shared))
    return found


@torch.no_grad()
def traffic_of(shape: Shape, changes: dict[str, Any]) -> list[Traffic]:
    """What this rank sends in each half."""
    vae, found = one_vae(**changes), []
    for half, x in inputs(shape).items():
        with count_traffic() as traffic:
            call(vae, half, x, dist.group.WORLD)
        found.append(traffic)
    return found


@torch.no_grad()
def peaks(half: str, shape: Shape) -> tuple[int, int, int]:
    """Bytes alive at most, alone and in the group, and those of the result."""
    vae, x = one_vae(), inputs(shape)[half]
    found = []
    for group in (None, dist.group.WORLD):
        with LiveBytes() as used:
            result = call(vae, half, x, group)
        found.append(used.peak)
    return found[0], found[1], result.numel() * result.element_size()


def _own_statistics(strip: Any, own: Tensor) -> Tensor:
    return parallel.group_norm_stats(own, 4)


def _edges_repeated(
    x: Tensor, strips: Strips, group: Any, *, dim: int, before: int, after: int
) -> Exchange:
    rank = group.rank()
    (start, stop), (first, last) = strips.own(rank), strips.held(rank)
    if first < start:
        x.narrow(dim, 0, 1).copy_(x.narrow(dim, 1, 1))
    if stop < last:
        x.narrow(dim, last - first - 1, 1).copy_(x.narrow(dim, last - first - 2, 1))
    return Exchange([], [], [])


def _keys_of_others_late(strip: Any, rows: Tensor, index: int) -> Tensor:
    """Frames of all strips but the first one come a frame late."""
    tokens = _TOKENS(strip, rows, index)
    frames, height, width = strip._cut.sizes[index]
    whole = tokens.unflatten(1, (frames, height * width)).clone()
    half = height * width // 2
    whole[:, 1:, half:] = whole[:, :-1, half:].clone()
    return whole.flatten(1, 2)


def _fetching(before: int, after: int, strided: int) -> property:
    """These factors of the rows that are fetched before layers without and with a stride."""

    def fetched(cut: Cut) -> list[tuple[int, int]]:
        return [
            (rows[0] * (before if layer.stride[1] == 1 else strided), rows[1] * after)
            for layer, rows in zip(cut.layers, _FETCHED(cut), strict=True)
        ]

    return property(fetched)


_TOKENS = parallel._Strip._tokens
_FETCHED = Cut.__dict__["fetched"].func
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "statistics of the own strip": (parallel._Strip, "_stats", _own_statistics),
    "no row from behind": (Cut, "fetched", _fetching(1, 0, 1)),
    "no row from before": (Cut, "fetched", _fetching(0, 1, 1)),
    "no row before halving": (Cut, "fetched", _fetching(1, 1, 0)),
    "edges of inner strips repeated": (parallel, "exchange_margins", _edges_repeated),
    "keys of other strips a frame late": (parallel._Strip, "_tokens", _keys_of_others_late),
}


@contextmanager
def fault(name: str) -> Iterator[None]:
    """The VAE with one mistake."""
    with patch.object(*FAULTS[name]):
        yield


def with_fault(name: str, shape: Shape) -> list[Difference | None]:
    """Differences of a VAE with one mistake."""
    with fault(name):
        return differences([shape], torch.float32)


@torch.no_grad()
def tiles(tiling: Tiling, shapes: list[Shape]) -> list[tuple[bool, int]]:
    """Whether the group has the bits of one process, and bytes that this rank sends."""
    vae, found = one_vae(), []
    vae.enable_tiling(tiling)
    for shape in shapes:
        for half, x in inputs(shape).items():
            with count_traffic() as traffic:
                shared = call(vae, half, x, dist.group.WORLD)
            found.append((torch.equal(call(vae, half, x), shared), traffic.total))
    return found


def refusals() -> list[str]:
    """What is said to calls that a group cannot answer."""
    vae, x = one_vae(), inputs((1, 1, 2, 2))
    group, said = dist.group.WORLD, []
    z = x["decode"].requires_grad_()
    for attempt in (
        lambda: vae.decode(z.detach(), "1GiB", group=group),
        lambda: vae.encode(x["encode"], 1 << 30, group=group),
        lambda: vae.decode(z.detach(), offload=True, group=group),
        lambda: vae.decode(z, group=group),
        lambda: vae.decode(z.detach()[..., : 1 + dist.get_rank()], group=group),
    ):
        try:
            attempt()
        except ValueError as refused:
            said.append(str(refused))
    return said
