"""From latents, numbers and vectors to the model width."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_fast.modules.mlp import EmbeddingMLP

Grid = tuple[int, int, int]


class PatchEmbedding(nn.Module):
    """A strided convolution that cuts the latent video into patches and projects each to one token.

    latents: (B, C, T, H, W)    tokens: which ones to return, of L
    returns: (B, L, E), L = (T / pt) * (H / ph) * (W / pw), time slowest, width fastest

    Patches do not overlap, so this is one matrix product, and written as one: it costs the same and
    keeps clear of low-precision 3D convolutions, which some cuDNN releases compute wrongly.
    """

    def __init__(self, patch_size: Grid, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor, tokens: slice = slice(None)) -> Tensor:
        patches = patchify(latents.to(self.proj.weight.dtype), self.patch_size)[:, tokens]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def patchify(video: Tensor, patch_size: Grid) -> Tensor:
    """Lay each patch out as a row of features ordered (channel, pt, ph, pw).

    video: (B, C, T, H, W)    returns: (B, L, C * pt * ph * pw)
    """
    pt, ph, pw = patch_size
    blocks = (
        video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    )  # (B, C, t, pt, h, ph, w, pw)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: Grid) -> Tensor:
    """The inverse of :func:`patchify`.

    tokens: (B, t * h * w, C * pt * ph * pw)    grid: (t, h, w)
    returns: (B, C, t * pt, h * ph, w * pw)
    """
    blocks = tokens.unflatten(2, (-1, *patch_size)).unflatten(
        1, grid
    )  # (B, t, h, w, C, pt, ph, pw)
    sizes = [count * size for count, size in zip(grid, patch_size, strict=True)]
    # one reshape, whose copy is no view: what a sharded model returns must not be one
    return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(tokens.shape[0], -1, *sizes)


def sinusoidal_embedding(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of each value times ``dim / 2`` frequencies ``max_period^(-2i / dim)``.

    values: (B,), any floating dtype    returns: (B, dim), float32

    Source: Vaswani et al., "Attention Is All You Need", section 3.5, with the halves side by side.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Embeds one number per sample (a timestep, a guidance scale) by a sinusoid and two layers.

    values: (B,)    returns: (B, E), dtype of the weights

    The sinusoid is float32 whatever the dtype of the model: rounded to bfloat16, a timestep near
    1000 would be off by up to 2.
    """

    FREQUENCIES_DIM = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = EmbeddingMLP(self.FREQUENCIES_DIM, dim, "0", "2")

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(values, self.FREQUENCIES_DIM))
