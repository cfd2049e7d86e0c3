"""Tensors of one process and those of many: gathered for a checkpoint, cut again when it is read.

What is stored knows nothing of the layout. A weight that lies in parts, its gradient, moments and
averages are all parted alike, so that one object turns them into whole tensors and back, tensor by
tensor and bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor

from hunyuan_fast.distributed.traffic import sent


class Cuts(Protocol):
    """How processes share parameters by heads or channels."""

    @property
    def cuts(self) -> Mapping[str, Any]:
        """By name of what is cut."""
        ...

    def to_canonical(self, name: str, tensor: Tensor) -> Tensor:
        """The whole, on every process; all take part."""
        ...

    def from_canonical(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of the whole; nothing is sent."""
        ...


class Wholes:
    """Whole tensors of a module's parameters, by name.

    cuts: where some are shared by heads or channels. Of these, what fully_shard parts is the local
        part, so that it is joined first
    """

    def __init__(self, module: nn.Module, cuts: Cuts | None = None) -> None:
        self.module = module
        self._cuts = cuts

    def is_cut(self, name: str) -> bool:
        """Whether a parameter is shared by heads or channels."""
        return self._cuts is not None and name in self._cuts.cuts

    def gather(self, name: str, x: Tensor) -> Tensor:
        """The whole of a tensor that is parted as the parameter is; every process calls this."""
        local = whole_of(x)
        return local if self._cuts is None else self._cuts.to_canonical(name, local)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a whole tensor, in memory of its own; nothing is sent."""
        local = whole if self._cuts is None else self._cuts.from_canonical(name, whole)
        parameter = self.module.get_parameter(name)
        if not isinstance(parameter, DTensor):
            return local.to(parameter.device, copy=True)
        mesh, placements = parameter.device_mesh, parameter.placements
        local = local.to(mesh.device_type)
        return distribute_tensor(local, mesh, placements, src_data_rank=None).to(parameter.device)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set all parameters from whole ones, and what else the state dict holds."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        own = self.module.state_dict()
        if own.keys() != state.keys():
            differing = sorted(own.keys() ^ state.keys())
            raise ValueError(f"state must hold the names of the module, differing in {differing}")
        for name, x in own.items():
            x.copy_(self.part(name, state[name]) if name in parameters else state[name])


def whole_of(x: Tensor) -> Tensor:
    """The whole of a tensor that fully_shard has parted, of others the tensor itself."""
    if not isinstance(x, DTensor):
        return x
    # parts that wait in host memory are gathered where the group can send
    return cast(DTensor, x.to(x.device_mesh.device_type)).full_tensor()


def local_of(x: Tensor) -> Tensor:
    """The part of this process, in its own memory: changing it changes the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def from_owner(x: Tensor, owner: int, group: ProcessGroup) -> Tensor:
    """The tensor of one rank of the group, on all of its ranks; elsewhere x gives the shape."""
    x = x.detach().contiguous()
    if group.rank() == owner:
        sent("broadcast", x.numel() * x.element_size())
    else:
        x = torch.empty_like(x)
    dist.broadcast(x, dist.get_global_rank(group, owner), group)
    return x
