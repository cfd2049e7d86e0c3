"""The causal 3D VAE: clips to latents and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.decoder import Decoder
from hunyuan_fast.models.vae.encoder import Encoder
from hunyuan_fast.models.vae.posterior import DiagonalGaussian
from hunyuan_fast.models.vae.tiling import PRESETS, Axis, Tiling, map_spatial_tiles, map_temporal_tiles
from hunyuan_fast.modules.causal_conv3d import causal_conv3d


class HunyuanVideoVAE(nn.Module):
    """Variational autoencoder that compresses video by 4 in time and 8 x 8 in space.

    Built from the keywords of `VAEConfig`; the defaults are the released network.
    Source: technical report, section 4.1.
    """

    config_class: ClassVar[type[VAEConfig]] = VAEConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.config = VAEConfig(**kwargs)
        self.tiling: Tiling | None = None
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv3d(2 * latent, 2 * latent, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(latent, latent, kernel_size=1)

    @classmethod
    def from_config(cls, config: VAEConfig) -> HunyuanVideoVAE:
        """Build the network of a config, with fresh weights."""
        return cls(**asdict(config))

    def enable_tiling(self, preset: str = "official") -> None:
        """Encode and decode in overlapping tiles from now on: less memory, slightly other pixels.

        preset: "official" (64 frames a window) or "diffusers" (16). Raises ValueError for any other.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
        self.tiling = PRESETS[preset]

    def disable_tiling(self) -> None:
        """Encode and decode whole clips from now on."""
        self.tiling = None

    def encode(self, video: Tensor) -> DiagonalGaussian:
        """Posterior over latents of video (B, 3, T, H, W) in [-1, 1], T = 4n + 1, H and W multiples of 8.

        Mean and logvar are (B, latent_channels, (T-1)/4 + 1, H/8, W/8) in the dtype of video, unscaled:
        multiply samples by `config.scaling_factor` before diffusion.
        Raises ValueError for any other shape, dtype or range.
        """
        return DiagonalGaussian.from_moments(self._encode_moments(video))

    def decode(self, z: Tensor) -> Tensor:
        """Video (B, 3, 4(T-1) + 1, 8H, 8W) of unscaled latents z (B, latent_channels, T, H, W).

        Values are about [-1, 1] and not clamped. Raises ValueError for any other shape or dtype.
        """
        return self._decode(z)

    def _encode_moments(self, video: Tensor) -> Tensor:
        moments = self.encoder(video.contiguous(memory_format=torch.channels_last_3d))
        return causal_conv3d(moments, self.quant_conv.weight, self.quant_conv.bias)

    def _decode(self, z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(causal_conv3d(z, self.post_quant_conv.weight, self.post_quant_conv.bias))
