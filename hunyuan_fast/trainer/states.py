"""The state of a run as a single process has it, whatever the layout of the one that wrote it.

Every tensor is gathered by itself and kept by the first process, which needs room in host memory
for all of them; a run of any layout reads its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hunyuan_fast.distributed.wholes import Wholes, from_owner
from hunyuan_fast.trainer.ema import EMA
from hunyuan_fast.trainer.optim import states_here
from hunyuan_fast.trainer.team import Team

State = dict[str, Any]


class RunStates:
    """What a run keeps between steps: weights, moments and averages."""

    def __init__(
        self, wholes: Wholes, optimizers: list[torch.optim.Optimizer], ema: EMA, team: Team
    ) -> None:
        self.wholes = wholes
        self.optimizers = optimizers
        self.ema = ema
        self.team = team
        self._names = {p: name for name, p in wholes.module.named_parameters()}

    @torch.no_grad()
    def gather(self) -> State:
        """All of it, whole; every process calls this, and the first one gets the tensors."""
        module = self.wholes.module.state_dict()
        return {
            "module": {name: self._whole(name, x) for name, x in module.items()},
            "optimizers": [self._gather_moments(optimizer) for optimizer in self.optimizers],
            "ema": {
                "num_updates": self.ema.num_updates,
                "average": {name: self._whole(name, x) for name, x in self.ema.average.items()},
            },
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take the parts of this process of what :meth:`gather` gave."""
        self.wholes.load(state["module"])
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            self._load_moments(optimizer, moments)
        self.ema.num_updates = state["ema"]["num_updates"]
        for name, average in self.ema.average.items():
            average.copy_(self.wholes.part(name, state["ema"]["average"][name]))

    def _whole(self, name: str, x: Tensor) -> Tensor | None:
        whole = self.wholes.gather(name, x)
        return whole.cpu() if self.team.is_first else None

    def _gather_moments(self, optimizer: torch.optim.Optimizer) -> State:
        """What ``optimizer.state_dict()`` is in a single process."""
        here, params = states_here(optimizer), _params(optimizer)
        held = {i: here.state[p] for i, p in enumerate(params) if p in here.state}
        data = None if here is optimizer else self.team.group("data")
        forms, owners = _forms(held, data)
        state: dict[int, State] = {}
        for i in sorted(forms):
            state[i] = dict(forms[i])
            for key in (key for key, scalar in forms[i].items() if scalar is None):
                x = held[i][key] if i in held else params[i].detach()
                x = x if data is None else from_owner(x, owners[i], data)
                state[i][key] = self._whole(self._names[params[i]], x)
        return {"state": state, "param_groups": [_settings(here, range(len(params)))]}

    def _load_moments(self, optimizer: torch.optim.Optimizer, moments: State) -> None:
        here = states_here(optimizer)
        index = {p: i for i, p in enumerate(_params(optimizer))}
        state = {
            i: self._part_of(p, moments["state"][index[p]])
            for i, p in enumerate(_params(here))
            if index[p] in moments["state"]
        }
        settings = {**moments["param_groups"][0], "params": list(range(len(_params(here))))}
        here.load_state_dict({"state": state, "param_groups": [settings]})

    def _part_of(self, p: nn.Parameter, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self._names[p]
        return {
            key: self.wholes.part(name, x) if x.dim() else x.clone() for key, x in entries.items()
        }


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def _settings(optimizer: torch.optim.Optimizer, indices: range) -> State:
    group = optimizer.param_groups[0]
    return {**{k: v for k, v in group.items() if k != "params"}, "params": list(indices)}


def _forms(
    held: Mapping[int, Mapping[str, Tensor]], group: ProcessGroup | None
) -> tuple[dict[int, dict[str, Tensor | None]], dict[int, int]]:
    """Keys and scalars of each parameter, ``None`` for tensors; and who in the group has them."""
    own = {
        i: {key: None if x.dim() else x.detach().cpu() for key, x in entries.items()}
        for i, entries in held.items()
    }
    if group is None:
        return own, {}
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, own, group=group)
    forms = {i: form for forms in found for i, form in forms.items()}
    return forms, {i: rank for rank, forms in enumerate(found) for i in forms}
