"""Root-mean-square normalisation of query and key heads."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    x: (..., D), any floating dtype    returns: (..., D), dtype of x

    Statistics and the division are in float32 at least; the result is rounded to the dtype of x
    before it meets the weight, as in the arithmetic the released checkpoint was trained with.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)
