"""Adaptive layer norm: shifts, scales and gates made from the conditioning vector."""

from torch import Tensor, nn
from torch.nn import functional as F


class Modulation(nn.Module):
    """SiLU and a linear layer that turn the conditioning vector into ``num_vectors`` vectors.

    vec: (B, E)    returns: num_vectors tensors (B, E)

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", section 3.2.
    """

    def __init__(self, dim: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(dim, num_vectors * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec)).chunk(self.num_vectors, dim=-1)
