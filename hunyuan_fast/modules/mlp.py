"""The feed-forward networks: two linear layers with an activation between them."""

from collections import OrderedDict

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, activation, linear.

    x: (..., E)    returns: (..., E)
    """

    def __init__(self, dim: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.act = activation
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def embedding_mlp(in_features: int, dim: int, first: str, last: str) -> nn.Sequential:
    """Linear, SiLU, linear, as every condition passes on its way to the model width.

    x: (..., in_features)    returns: (..., dim)

    ``first`` and ``last`` name the linear layers, which the checkpoint calls by several names.
    """
    layers = [(first, nn.Linear(in_features, dim)), ("act", nn.SiLU()), (last, nn.Linear(dim, dim))]
    return nn.Sequential(OrderedDict(layers))
