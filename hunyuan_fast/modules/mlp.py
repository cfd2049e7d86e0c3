"""The feed-forward networks: two linear layers with an activation between them."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hunyuan_fast.ops.gelu_tanh import gelu_tanh


class MLP(nn.Module):
    """Linear, activation, linear.

    x: (..., E)    returns: (..., E)

    ``activation`` may write to its argument when no gradient is asked for.
    """

    def __init__(self, dim: int, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.activation = activation
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, in place when no gradient is asked for."""
    return gelu_tanh(x) if torch.is_grad_enabled() else gelu_tanh(x, out=x)


class EmbeddingMLP(nn.Sequential):
    """Linear, SiLU, linear, as every condition passes on its way to the model width.

    x: (..., in_features), any floating dtype    returns: (..., dim), dtype of the weights

    ``first`` and ``last`` name the linear layers, which the checkpoint calls by several names.
    """

    def __init__(self, in_features: int, dim: int, first: str, last: str) -> None:
        layers = [
            (first, nn.Linear(in_features, dim)),
            ("act", nn.SiLU()),
            (last, nn.Linear(dim, dim)),
        ]
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(next(self.parameters()).dtype))
