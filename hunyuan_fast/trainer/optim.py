"""Optimisers: Muon for the matrices and kernels inside a network, AdamW for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from hunyuan_fast.distributed.collectives import all_reduce_sum
from hunyuan_fast.distributed.wholes import Wholes, local_of
from hunyuan_fast.trainer.muon import Muon
from hunyuan_fast.trainer.team import Team


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Peak learning rates and their companions.

    muon_lr: learning rate of Muon; None trains everything by AdamW
    muon_excludes: parts of names that AdamW keeps. Modulations begin at zero and scale others;
        first and last layers face data rather than features.
    """

    lr: float
    muon_lr: float | None = None
    muon_excludes: tuple[str, ...] = ("mod", "final_layer", "conv_out", "embed", "lm_head")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def takes_muon(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether Muon trains this parameter."""
        if self.muon_lr is None or parameter.ndim < 2:
            return False
        return not any(part in name for part in self.muon_excludes)


def build_optimizers(
    module: nn.Module, config: OptimConfig, team: Team | None = None, wholes: Wholes | None = None
) -> list[torch.optim.Optimizer]:
    """One or two optimisers over the trainable parameters of ``module``, AdamW first.

    team: with zero = 1 each process updates some parameters and sends them to the others
    wholes: of parameters in parts, for Muon, which needs whole matrices; None: they are whole
    Raises ValueError for what cannot be updated exactly.
    """
    team = team or Team()
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inner = [(name, p) for name, p in trainable if config.takes_muon(name, p)]
    outer = [p for name, p in trainable if not config.takes_muon(name, p)]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    optimizers: list[torch.optim.Optimizer] = []
    if outer:
        optimizers.append(_divided(torch.optim.AdamW, outer, team, **settings))
    if config.muon_lr is not None and inner:
        if team.layout.zero == 1 and team.layout.tp > 1:
            raise ValueError(
                f"muon_lr must be None with zero = 1 and tp = {team.layout.tp}, where processes "
                f"that share a matrix update different ones, got {config.muon_lr}; take another "
                "zero, or train by AdamW alone"
            )
        matrices, settings = [p for _, p in inner], {"lr": config.muon_lr}
        if wholes is not None and team.layout.zero != 1:
            settings |= {"names": {p: name for name, p in inner}, "wholes": wholes}
        optimizers.append(_divided(Muon, matrices, team, **settings))
    return optimizers


def _divided(
    kind: type[torch.optim.Optimizer],
    params: list[nn.Parameter],
    team: Team,
    **settings: Any,
) -> torch.optim.Optimizer:
    """An optimiser, whose states are divided by parameters with zero = 1."""
    data = team.group("data")
    if team.layout.zero != 1 or data is None:
        return kind(params, **settings)
    return ZeroRedundancyOptimizer(params, kind, process_group=data, **settings)


def states_here(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser whose states this process holds: the local part of a divided one."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer.optim
    return optimizer


def clip_gradients(module: nn.Module, max_norm: float, team: Team, wholes: Wholes) -> float:
    """Scale all gradients down to a norm, and return the norm they had: one, of the whole model.

    Parts of a tensor count where they lie, what every process holds counts once.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    parameters = [p for _, p in named]
    if team.mesh is None:
        return clip_grad_norm_(parameters, max_norm).item()
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])  # on every process of tp, and cut over it
    for name, p in named:
        assert p.grad is not None
        groups[wholes.is_cut(name)].append(local_of(p.grad))
    device = team.mesh.device_type
    squares = [get_total_norm(grads).to(device, torch.float64).square() for grads in groups]
    data, tp = team.group("data"), team.group("tp")
    if team.layout.zero >= 2 and data is not None:
        squares = list(all_reduce_sum(torch.stack(squares), data))
    if tp is not None:
        squares[1] = all_reduce_sum(squares[1], tp)
    norm = (squares[0] + squares[1]).sqrt().to(parameters[0].dtype)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
