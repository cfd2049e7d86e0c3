"""Clips and images as latents, encoded once: what the transformer trains on."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan_fast.data.shapes.batches import caption, clip
from hunyuan_fast.distributed.shards import part
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.ops.collectives import gather
from hunyuan_fast.trainer.team import Team


class LatentSet:
    """Latents (N, C, T, H, W), scaled to unit variance, and the captions of the same scenes."""

    def __init__(self, latents: Tensor, *, seed: int, frames: int) -> None:
        self.latents = latents
        self.seed = seed
        self.frames = frames

    def __len__(self) -> int:
        return len(self.latents)

    def caption(self, index: int, *, variant: int) -> str:
        """A phrasing of scene ``index``; images are described without motion."""
        return caption(self.seed, index, variant=variant, motion=self.frames > 1)


@torch.no_grad()
def encode_clips(
    vae: HunyuanVideoVAE,
    path: Path,
    *,
    seed: int,
    count: int,
    frames: int,
    size: int,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    team: Team | None = None,
) -> LatentSet:
    """Render and encode scenes 0 to count - 1 of the stream ``seed``, or read them from ``path``.

    The latents are posterior means, unscaled, bf16. team: deals the batches out to its processes,
    and its first one writes. Raises ValueError for a file of another size.
    """
    team = team or Team()
    if team.by_first(path.is_file):
        latents = load_file(path)["latents"]
        if len(latents) != count:
            raise ValueError(
                f"{path} holds {len(latents)} clips, expected {count}; delete it to encode anew"
            )
        return LatentSet(latents, seed=seed, frames=frames)
    rows = []
    device = next(vae.parameters()).device
    firsts = range(0, count, batch)
    share = team.share
    for first in firsts[share.rows(len(firsts))]:
        items = range(first, min(count, first + batch))
        video = torch.stack([clip(seed, item, num_frames=frames, size=size) for item in items])
        with torch.autocast(device.type, torch.bfloat16):
            rows.append(vae.encode(video.to(device)).mode().to("cpu", torch.bfloat16))
        if progress is not None:
            progress(items[-1] + 1, count)
    held = [firsts[part(share.sizes(len(firsts)), rank)] for rank in range(share.count)]
    sizes = tuple(sum(min(batch, count - first) for first in chunk) for chunk in held)
    latents = torch.cat(rows)[: sizes[share.index]]
    latents = gather(latents, sizes, team.group("dp"), dim=0).contiguous()
    if team.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        save_file({"latents": latents}, written)
        written.replace(path)
    return LatentSet(latents, seed=seed, frames=frames)
