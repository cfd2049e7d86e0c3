"""What the VAE takes: shapes, dtypes and values are checked before any work begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.ops.collectives import gather

# Pixels may leave [-1, 1] by this much, for roundings on the way.
_TOLERANCE = 0.01


def check_video(config: VAEConfig, video: Tensor) -> None:
    """Raise ValueError or TypeError unless video is (B, C, 4n+1, 8m, 8k), floating, in [-1, 1]."""
    _check_dims("video", video, config.in_channels)
    time, space = config.temporal_compression_ratio, config.spatial_compression_ratio
    _, _, frames, height, width = video.shape
    if (frames - 1) % time:
        below = frames - (frames - 1) % time
        raise ValueError(
            f"video must have {time}n + 1 frames, got {frames}; use {below} or {below + time}"
        )
    if height % space or width % space:
        raise ValueError(
            f"video must have height and width in multiples of {space}, got {height} x {width}; "
            "crop or resize it"
        )
    if _can_read(video):
        # frame by frame: of values that are not contiguous a copy is made
        bounds = [frame.aminmax() for frame in video.detach().unbind(2)]
        low = float(torch.stack([bound.min for bound in bounds]).min())
        high = float(torch.stack([bound.max for bound in bounds]).max())
        limit = 1 + _TOLERANCE
        # written so that NaN fails too
        if not (-limit <= low and high <= limit):
            raise ValueError(
                f"video must hold values in [-1, 1], got {low:.4g} to {high:.4g}; "
                "bring bytes there with x / 127.5 - 1, or clamp"
            )


def check_latents(config: VAEConfig, z: Tensor) -> None:
    """Raise ValueError or TypeError unless z is (B, latent_channels, T, H, W), floating, finite."""
    _check_dims("z", z, config.latent_channels)
    if _can_read(z) and not z.isfinite().all():
        raise ValueError("z must be finite, got NaN or infinity")


def check_budget(model: nn.Module, x: Tensor, *, tiled: bool, offload: bool) -> None:
    """Raise ValueError unless a memory budget makes sense for this call."""
    if _records(model, x):
        raise ValueError(
            "memory_budget must be None while gradients are recorded; call within torch.no_grad()"
        )
    if tiled:
        raise ValueError(
            "memory_budget must be None while tiling is enabled; call disable_tiling() first"
        )
    if offload and x.device.type == "cpu":
        raise ValueError("offload must be False on the CPU: host memory is all there is")


def check_group(
    model: nn.Module, x: Tensor, memory_budget: int | str | None, *, offload: bool
) -> None:
    """Raise ValueError unless this call can be shared by several processes."""
    if memory_budget is not None:
        raise ValueError(
            f"memory_budget must be None with a group, got {memory_budget!r}; "
            "each process has its part of every map"
        )
    check_whole(offload)
    if _records(model, x):
        raise ValueError(
            "group must be None while gradients are recorded; call within torch.no_grad()"
        )


def check_alike(x: Tensor, group: ProcessGroup) -> None:
    """Raise ValueError on all ranks of the group unless they have inputs of one shape."""
    shape = torch.tensor([x.shape], device=x.device)
    shapes = gather(shape, (1,) * group.size(), group, dim=0).tolist()
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"all processes of the group must have the same clip, got shapes {shapes}, rank by rank"
        )


def check_whole(offload: bool) -> None:
    """Raise ValueError where a call without a budget asks for what belongs to one."""
    if offload:
        raise ValueError("offload must be False without a memory_budget, which it serves")


def _check_dims(name: str, x: Tensor, channels: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} must be (B, {channels}, T, H, W), got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def _records(model: nn.Module, x: Tensor) -> bool:
    """Whether gradients are recorded."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in model.parameters())
    )


def _can_read(x: Tensor) -> bool:
    """Whether values may steer the program: not while it is traced, nor without storage."""
    return not x.is_meta and not torch.compiler.is_compiling()
