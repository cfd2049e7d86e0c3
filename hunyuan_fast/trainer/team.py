"""The processes that train one module together: who draws what, who writes, what they agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.broadcast import from_first
from hunyuan_fast.distributed.collectives import all_reduce_sum
from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.distributed.wholes import Wholes
from hunyuan_fast.models.dit.fully_sharded import average_gradients, shard_states
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.dit.parallel import parallelize
from hunyuan_fast.models.dit.resharding import Resharding
from hunyuan_fast.trainer.share import ALONE, Share

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """A module's layout over the processes that train it, or over the only one.

    mesh: of the layout, ``None`` for a single process
    """

    layout: Layout = field(default_factory=Layout)
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Team:
        """All processes of the default group, which must be as many as the layout has."""
        if layout.is_single and not layout.offload:
            return cls(layout)
        layout.check_world(dist.get_world_size())
        return cls(layout, build_mesh(layout, device.type))

    def data_parallel(self) -> Team:
        """The same processes, each with samples of its own: for modules that are not cut."""
        if self.mesh is None:
            return self
        return Team.of(Layout(dp=self.layout.world_size), torch.device(self.mesh.device_type))

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def share(self) -> Share:
        """The samples of this process: those of its dp rank."""
        if self.mesh is None:
            return ALONE
        return Share(self.mesh["dp"].get_local_rank(), self.layout.dp)

    def group(self, name: str) -> ProcessGroup | None:
        """The group along a dim of the mesh; ``None``: nobody else is in it."""
        return None if self.mesh is None else group_of(self.mesh, name)

    def place(self, transformer: HunyuanVideoTransformer) -> None:
        """Share a transformer as the layout says, in place."""
        if self.mesh is not None:
            parallelize(transformer, self.mesh, self.layout)
            shard_states(transformer, self.mesh, self.layout)

    def replicate(self, module: nn.Module) -> None:
        """Let every process hold all of a module, with averaged gradients."""
        if self.mesh is not None:
            average_gradients(module, self.mesh)

    @torch.no_grad()
    def whole(self, transformer: HunyuanVideoTransformer) -> HunyuanVideoTransformer:
        """The model of a single process, on every process: the same one if nobody shares it."""
        if self.mesh is None:
            return transformer
        wholes = self.wholes(transformer)
        state = {name: wholes.gather(name, x) for name, x in transformer.state_dict().items()}
        alone = HunyuanVideoTransformer.from_config(transformer.config).to(self.mesh.device_type)
        alone.load_state_dict(state)
        return alone.train(transformer.training)

    def wholes(self, module: nn.Module) -> Wholes:
        """The map between parts of the module's tensors and whole ones."""
        if isinstance(module, HunyuanVideoTransformer) and module.cuts:
            return Wholes(module, Resharding(module))
        return Wholes(module)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.mesh is None:
            return flag
        return bool(self._sum(torch.tensor([int(flag)])).item())

    def means(self, figures: dict[str, float]) -> dict[str, float]:
        """Means of the figures over all processes, the same on each."""
        if self.mesh is None or not figures:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        total = self._sum(values) / dist.get_world_size()
        return dict(zip(figures, total.tolist(), strict=True))

    def by_first(self, function: Callable[[], T]) -> T:
        """What a function gives on the first process; where it fails, it fails everywhere."""
        return from_first(function, None if self.mesh is None else dist.group.WORLD)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        assert self.mesh is not None and dist.group.WORLD is not None
        return all_reduce_sum(values.to(self.mesh.device_type), dist.group.WORLD)
