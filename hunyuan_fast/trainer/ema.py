"""Exponential moving average of weights: what is shipped and what samples are drawn with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hunyuan_fast.distributed.wholes import local_of


class EMA:
    """fp32 averages of a module's parameters, with the usual rise of the decay at the start.

    decay: at step ``n`` the factor is ``min(decay, (1 + n) / (10 + n))``, so that early averages
    forget the random initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.module = module
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().float().clone() for name, p in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the module's current weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        names, current = zip(*self._parameters(), strict=True)
        torch._foreach_lerp_(
            [local_of(self.average[name]) for name in names],
            [local_of(p).float() for p in current],
            1 - decay,
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averages; its own weights come back afterwards."""
        kept = {name: p.detach().clone() for name, p in self._parameters()}
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters():
                    p.copy_(kept[name])

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights by the averages."""
        for name, p in self._parameters():
            p.copy_(self.average[name])
