"""The causal 3D VAE of HunyuanVideo."""

from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.models.vae.posterior import DiagonalGaussian

__all__ = ["DiagonalGaussian", "HunyuanVideoVAE", "VAEConfig"]
