"""Root-mean-square normalisation of query and key heads."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """The weight of ``x / sqrt(mean(x^2) + eps) * weight`` over the features of a head.

    The blocks hand it to ``qk_norm_rope``, which normalises and rotates in one pass: what a call
    returns is the weight, (D,).
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self) -> Tensor:
        return self.weight

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
