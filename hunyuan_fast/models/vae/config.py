"""The shape of a VAE, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass


def _log2(name: str, ratio: int) -> int:
    if ratio < 1 or ratio & (ratio - 1):
        raise ValueError(f"{name} must be a power of two, got {ratio}")
    return ratio.bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Constructor keywords of `HunyuanVideoVAE`; the defaults are the released network.

    block_out_channels: channels of each level, from pixels to latents.
    layers_per_block: residual blocks of each encoder level; the decoder has one more.
    scaling_factor: diffusion works on latents times this; encode and decode do not apply it.
    Raises ValueError where the numbers do not fit together.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        counts = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor}")
        if not self.block_out_channels:
            raise ValueError("block_out_channels must name at least one level, got ()")
        for channels in self.block_out_channels:
            if channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels must be multiples of norm_num_groups = "
                    f"{self.norm_num_groups}, got {self.block_out_channels}"
                )
        steps = len(self.block_out_channels) - 1
        for name in ("spatial_compression_ratio", "temporal_compression_ratio"):
            ratio = getattr(self, name)
            if _log2(name, ratio) > steps:
                raise ValueError(
                    f"{name}={ratio} needs {_log2(name, ratio)} resampling steps, but "
                    f"{len(self.block_out_channels)} levels of block_out_channels allow {steps}"
                )

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """Downsampling (t, h, w) after each encoder level, and upsampling after each decoder level.

        Space changes in the first levels, time in the last ones before the final level.
        """
        levels = len(self.block_out_channels)
        spatial = _log2("spatial_compression_ratio", self.spatial_compression_ratio)
        temporal = _log2("temporal_compression_ratio", self.temporal_compression_ratio)
        return tuple(
            (
                2 if levels - 1 - temporal <= level < levels - 1 else 1,
                2 if level < spatial else 1,
                2 if level < spatial else 1,
            )
            for level in range(levels)
        )
