"""Pixels to latent moments."""

from __future__ import annotations

from torch import Tensor, nn

from hunyuan_fast.models.vae.blocks import DownBlock, MidBlock, Run, plainly, through
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.modules.causal_conv3d import CausalConv3d
from hunyuan_fast.modules.group_norm import GroupNormSiLU


class Encoder(nn.Module):
    """(B, in_channels, T, H, W) -> (B, 2 * latent_channels, T', H', W')."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(
                    widths[max(level - 1, 0)],
                    widths[level],
                    layers=config.layers_per_block,
                    num_groups=config.norm_num_groups,
                    stride=stride,
                )
                for level, stride in enumerate(config.strides)
            ]
        )
        self.mid_block = MidBlock(
            widths[-1], config.norm_num_groups, add_attention=config.mid_block_add_attention
        )
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, run: Run = plainly) -> Tensor:
        """run: how to call residual blocks and the attention."""
        levels = (*self.down_blocks, self.mid_block)
        layers = (layer for level in levels for layer in level.layers())
        x = through(layers, self.conv_in(x), run)
        return self.conv_out(x, norm=self.conv_norm_out)
