"""Group normalisation of the VAE, with SiLU or without."""

from __future__ import annotations

from torch import Tensor, nn

from hunyuan_fast.ops import group_norm_affine, group_norm_silu, group_norm_stats


class GroupNorm(nn.GroupNorm):
    """Group norm over (T, H, W) together. (B, C, T, H, W) -> same shape, channels-last."""

    silu = False

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(self, x: Tensor, stats: Tensor | None = None) -> Tensor:
        """The norm of x; with ``stats``, by those of the clip that x is a chunk of."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            silu=self.silu,
            stats=stats,
        )

    def scale_and_shift(self, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C) each: the norm of x, or by the statistics of its clip, without a gradient."""
        if stats is None:
            stats = group_norm_stats(x, self.num_groups)
        return group_norm_affine(stats, self.weight, self.bias, eps=self.eps)


class GroupNormSiLU(GroupNorm):
    """Group norm over (T, H, W) together, then SiLU, in one."""

    silu = True
