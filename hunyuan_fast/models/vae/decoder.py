"""Latents to pixels."""

from __future__ import annotations

from torch import Tensor, nn

from hunyuan_fast.models.vae.blocks import MidBlock, Run, UpBlock, plainly, through
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.modules.causal_conv3d import CausalConv3d
from hunyuan_fast.modules.group_norm import GroupNormSiLU


class Decoder(nn.Module):
    """(B, latent_channels, T', H', W') -> (B, out_channels, T, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(
            widths[0], config.norm_num_groups, add_attention=config.mid_block_add_attention
        )
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(
                    widths[max(level - 1, 0)],
                    widths[level],
                    layers=config.layers_per_block + 1,
                    num_groups=config.norm_num_groups,
                    factor=factor,
                )
                for level, factor in enumerate(config.strides)
            ]
        )
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, x: Tensor, run: Run = plainly) -> Tensor:
        """run: how to call residual blocks and the attention."""
        levels = (self.mid_block, *self.up_blocks)
        layers = (layer for level in levels for layer in level.layers())
        x = through(layers, self.conv_in(x), run)
        return self.conv_out(x, norm=self.conv_norm_out)
