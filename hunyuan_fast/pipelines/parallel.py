"""A pipeline over many processes: each calls it alike, and together they make the videos.

The videos of a call are dealt out to the dp groups. The processes of one group (cp x tp) share the
work of the transformer and of the autoencoder on theirs. The first of them encodes the prompts for
all, and rank 0 draws the noise, so that whatever they were given, all of a group walk from the same
noise under the same conditions. Rank 0 returns all videos, the other ranks an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.broadcast import from_first, tensor_from_first, to_first
from hunyuan_fast.distributed.collectives import rank_in, size_of
from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.distributed.shards import part, split_sizes
from hunyuan_fast.models.dit.fully_sharded import shard_states
from hunyuan_fast.models.dit.parallel import parallelize as share_transformer
from hunyuan_fast.pipelines.inputs import Request

if TYPE_CHECKING:
    from hunyuan_fast.pipelines.text_to_video import HunyuanVideoPipeline


class Ranks:
    """Who of the processes of a pipeline does what; without a mesh there is one process.

    video: those that make one video, None for this one alone
    device: where the transformer computes, if its weights may wait elsewhere
    """

    def __init__(self, mesh: DeviceMesh | None = None, device: torch.device | None = None) -> None:
        self.device = device
        self._everybody: ProcessGroup | None = None if mesh is None else dist.group.WORLD
        self._replicas = None if mesh is None else group_of(mesh, "dp")
        self.video = None if mesh is None else group_of(mesh, "video")
        self.is_first_of_video = rank_in(self.video) == 0

    def request(self, read: Callable[[], Request]) -> Request:
        """The call of rank 0 on all ranks; its latents and its callback stay there.

        Raises ValueError when a dp group would have no video.
        """
        kept: list[Request] = []

        def plain() -> Request:
            request = read()
            count, groups = len(request.prompts), size_of(self._replicas)
            if count < groups:
                raise ValueError(
                    f"num_videos must be at least {groups} in all, one for each dp group, got "
                    f"{count}; make more videos, or share each of them with cp"
                )
            kept.append(request)
            return replace(request, latents=None, progress=None)

        request = from_first(plain, self._everybody)
        return kept[0] if kept else request

    def of_group(self, request: Request) -> Request:
        """The videos of this dp group alone."""
        mine = part(self._counts(len(request.prompts)), rank_in(self._replicas))
        prompts, negative = request.prompts[mine], request.negative_prompts
        return replace(
            request,
            prompts=prompts,
            negative_prompts=None if negative is None else negative[mine],
            seeds=request.seeds[mine],
            latents=None,  # they are in the noise
            latent_shape=(len(prompts), *request.latent_shape[1:]),
        )

    def noise(self, draw: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What rank 0 draws for all videos: the part of this dp group, bit for bit."""
        drawn = draw() if rank_in(self._everybody) == 0 else None
        noise = tensor_from_first(drawn, self._everybody, device)
        return noise[part(self._counts(len(noise)), rank_in(self._replicas))]

    def conditions(
        self, encode: Callable[[], dict[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """What the first of the group encodes, on all of the group, bit for bit."""
        made: dict[str, Tensor] = {}

        def names() -> list[str]:
            made.update(encode())
            return list(made)

        return {
            name: tensor_from_first(made.get(name), self.video, device)
            for name in from_first(names, self.video)
        }

    def videos(self, made: Tensor, count: int) -> Tensor:
        """All videos on rank 0, of those that the first of each dp group has; else none."""
        if not self.is_first_of_video:
            return made[:0]
        return to_first(made, self._counts(count), self._replicas)

    def _counts(self, count: int) -> tuple[int, ...]:
        """Videos of each dp group."""
        return split_sizes(count, size_of(self._replicas))


def check_layout(layout: Layout, num_heads: int) -> None:
    """Raise ValueError for a layout that no pipeline with a model of so many heads can have."""
    layout.check_heads(num_heads)
    if layout.zero not in (0, 3):
        raise ValueError(
            f"zero must be 0 or 3 where nothing is trained, got {layout.zero}; 3 keeps the weights "
            "once in dp x cp processes"
        )


def parallelize(pipeline: HunyuanVideoPipeline, layout: Layout, mesh: DeviceMesh | None) -> None:
    """Share the work of a pipeline, which every process has loaded, with the whole default group.

    The text encoders stay with the first process of each group alone.

    mesh: as of :func:`build_mesh`; None makes one
    Raises ValueError when the layout fits neither the model nor the number of processes.
    """
    check_layout(layout, pipeline.transformer.config.heads_num)
    if layout.is_single:
        return
    layout.check_world(dist.get_world_size())
    device = pipeline.device
    if mesh is None:
        mesh = build_mesh(layout, device.type)
    share_transformer(pipeline.transformer, mesh, layout)
    if layout.zero == 3:
        shard_states(pipeline.transformer, mesh, layout)
    pipeline.ranks = Ranks(mesh, device)
    if not pipeline.ranks.is_first_of_video:
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.to("meta")
