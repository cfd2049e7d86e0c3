"""Muon: momentum whose update is orthogonalised, for matrices and convolution kernels.

torch.optim.Muon takes matrices only. Here a kernel (O, I, t, h, w) counts as the matrix
(O, I*t*h*w), and all matrices of one shape are orthogonalised in one batched call, which is what
makes it cheap for small networks.
Source: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024); the
step is scaled to the root mean square of AdamW's, so that learning rates are comparable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hunyuan_fast.distributed.wholes import Wholes

# Quintic Newton-Schulz coefficients of the source: singular values end near 1 after five rounds.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_ADAMW_RMS = 0.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, approximately; (K, M, N) to (K, M, N) float32."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    wide = x.size(-2) <= x.size(-1)
    if not wide:
        x = x.mT
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised update.

    params: parameters of two or more dimensions    lr: step, in units of AdamW's root mean square
    names, wholes: of parameters that lie in parts on several processes. The matrix is gathered,
        every process finds the same update and takes its part of it.
    Raises ValueError for vectors and scalars, which have no singular values.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        *,
        names: Mapping[nn.Parameter, str] | None = None,
        wholes: Wholes | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._names = dict(names or {})
        self._wholes = wholes
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(
                        f"params must have two or more dimensions, got shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            shapes = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])
                ahead = self._whole(p, ahead)
                shapes[p] = ahead.shape
                updates[ahead.flatten(1).shape].append((p, ahead.flatten(1)))
            for shape, pairs in updates.items():
                step = group["lr"] * _ADAMW_RMS * max(shape) ** 0.5
                orthogonal = orthogonalize(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, orthogonal, strict=True):
                    p.add_(self._part(p, update.reshape(shapes[p])), alpha=-step)

    def _whole(self, p: nn.Parameter, x: Tensor) -> Tensor:
        return x if self._wholes is None else self._wholes.gather(self._names[p], x)

    def _part(self, p: nn.Parameter, x: Tensor) -> Tensor:
        return x if self._wholes is None else self._wholes.part(self._names[p], x)
