"""Optimisers: Muon for the matrices and kernels inside a network, AdamW for everything else."""

from dataclasses import dataclass

import torch
from torch import nn

from hunyuan_fast.trainer.muon import Muon


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


def build_optimizers(module: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """One or two optimisers over the trainable parameters of ``module``, AdamW first."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inner = [p for name, p in trainable if config.takes_muon(name, p)]
    outer = [p for name, p in trainable if not config.takes_muon(name, p)]
    optimizers: list[torch.optim.Optimizer] = []
    if outer:
        optimizers.append(
            torch.optim.AdamW(
                outer, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
            )
        )
    if config.muon_lr is not None and inner:
        optimizers.append(Muon(inner, lr=config.muon_lr))
    return optimizers
