"""The causal 3D VAE: clips to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from hunyuan_fast.distributed.collectives import size_of
from hunyuan_fast.models.vae.blocks import ResnetBlock, Run
from hunyuan_fast.models.vae.budget import read_bytes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.decoder import Decoder
from hunyuan_fast.models.vae.encoder import Encoder
from hunyuan_fast.models.vae.inputs import (
    check_alike,
    check_budget,
    check_group,
    check_latents,
    check_video,
    check_whole,
)
from hunyuan_fast.models.vae.layers import Half
from hunyuan_fast.models.vae.parallel import in_strips
from hunyuan_fast.models.vae.parallel_tiles import in_tiles
from hunyuan_fast.models.vae.plan import Plan, Progress
from hunyuan_fast.models.vae.planner import plan_decode, plan_encode
from hunyuan_fast.models.vae.posterior import DiagonalGaussian
from hunyuan_fast.models.vae.streaming import stream
from hunyuan_fast.models.vae.tiling import (
    PRESETS,
    Tiling,
    Window,
    latent_window,
    map_tiles,
    pixel_window,
)
from hunyuan_fast.models.vae.whole import whole
from hunyuan_fast.models.weights import Pretrained
from hunyuan_fast.ops import causal_conv3d


class HunyuanVideoVAE(Pretrained, nn.Module):
    """Variational autoencoder that compresses video by 4 in time and by 8 in height and width.

    Built from the keywords of `VAEConfig`. Parameters are named as in the official checkpoint.
    Source: technical report, section 4.1 (3D variational autoencoder).
    """

    config_class: ClassVar[type[VAEConfig]] = VAEConfig
    component: ClassVar[str] = "vae"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.config = VAEConfig(**kwargs)
        self.tiling: Tiling | None = None
        self.gradient_checkpointing = False
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv3d(2 * latent, 2 * latent, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(latent, latent, kernel_size=1)

    def enable_tiling(self, preset: str | Tiling = "official") -> None:
        """Encode and decode in overlapping tiles from now on: less memory, other pixels.

        preset: "official" (64 frames a window), "diffusers" (16 frames), or windows of your own.
        Pixels differ because group norm and edge padding see a tile, not the clip.
        Raises ValueError for an unknown name and for windows that are not whole latents.
        """
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise ValueError(
                    f"preset must be one of {sorted(PRESETS)} or a Tiling, got {preset!r}"
                )
            preset = PRESETS[preset]
        space, time = self.config.spatial_compression_ratio, self.config.temporal_compression_ratio
        pixel_window(preset.size, preset.size_stride, space)
        pixel_window(preset.frames, preset.frames_stride, time)
        self.tiling = preset

    def disable_tiling(self) -> None:
        """Encode and decode whole clips from now on, as at first."""
        self.tiling = None

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the inputs of blocks and attentions for backward and compute the rest again."""
        self.gradient_checkpointing = enabled

    def encode(
        self,
        video: Tensor,
        memory_budget: int | str | None = None,
        *,
        offload: bool = False,
        progress: Progress | None = None,
        group: ProcessGroup | None = None,
    ) -> DiagonalGaussian:
        """The posterior over latents of a clip.

        video: (B, in_channels, T, H, W) with values in [-1, 1], T = 4n + 1, H and W multiples of 8
        returns: mean and logvar (B, latent_channels, (T-1)/4 + 1, H/8, W/8) in the dtype of the
            weights, unscaled: diffusion works on samples times `config.scaling_factor`
        memory_budget, offload, progress, group: as for `decode`

        Raises ValueError for shapes and values that do not fit, TypeError for dtypes.
        """
        check_video(self.config, video)
        if group is not None and size_of(group) > 1:
            check_group(self, video, memory_budget, offload=offload)
            return DiagonalGaussian.from_moments(self._across("encode", video, group))
        if memory_budget is not None:
            moments = self._within(plan_encode, video, memory_budget, offload, progress)
            return DiagonalGaussian.from_moments(moments)
        check_whole(offload)
        video = self._enter(video)
        if self.tiling is None:
            return DiagonalGaussian.from_moments(self._encode_tile(video))
        windows = self._windows(self.tiling, "encode")
        return DiagonalGaussian.from_moments(map_tiles(self._encode_tile, video, *windows))

    def decode(
        self,
        z: Tensor,
        memory_budget: int | str | None = None,
        *,
        offload: bool = False,
        progress: Progress | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """The clip of unscaled latents.

        z: (B, latent_channels, T, H, W), finite; latents of diffusion divided by
            `config.scaling_factor`
        returns: (B, out_channels, 4(T-1) + 1, 8H, 8W) in the dtype of the weights, about [-1, 1],
            not clamped
        memory_budget: bytes, or text such as "6GiB", for all that is allocated beyond z and the
            weights, what is returned included; the values stay those of the whole clip, the time
            grows as `plan_decode` tells. None: every map whole, as with a budget that allows it.
            Not while gradients are recorded
        offload: maps between the passes wait in host memory, which the budget does not bound
        progress: called with the part of the arithmetic that is done; only with a budget
        group: processes that share the work, all of which call this with the same z and get the
            same clip: strips of every map, whose values are those of the whole clip, or, with
            tiling, tiles dealt out, with the bits of one process. Neither with a budget nor while
            gradients are recorded

        Raises ValueError for shapes and values that do not fit, and naming the least budget for a
        budget that cannot work; TypeError for dtypes.
        """
        check_latents(self.config, z)
        if group is not None and size_of(group) > 1:
            check_group(self, z, memory_budget, offload=offload)
            return self._across("decode", z, group)
        if memory_budget is not None:
            return self._within(plan_decode, z, memory_budget, offload, progress)
        check_whole(offload)
        z = self._enter(z)
        if self.tiling is None:
            return self._decode_tile(z)
        return map_tiles(self._decode_tile, z, *self._windows(self.tiling, "decode"))

    def _within(
        self,
        planned: Callable[..., Plan],
        x: Tensor,
        memory_budget: int | str,
        offload: bool,
        progress: Progress | None,
    ) -> Tensor:
        """The result for x by a plan that keeps to the budget."""
        check_budget(self, x, tiled=self.tiling is not None, offload=offload)
        budget, device = read_bytes(memory_budget), self.quant_conv.weight.device
        shape, dtype = tuple(x.shape), self._dtype_of_maps()
        plan = planned(self.config, shape, dtype, budget, offload=offload, device=device)
        if not plan.together:
            return stream(self, plan, x, progress)
        run = self._encode_tile if plan.half == "encode" else self._decode_tile
        return whole(self, plan, x, lambda x, through: run(self._enter(x), through), progress)

    def _across(self, half: Half, x: Tensor, group: ProcessGroup) -> Tensor:
        """The result for x by all processes of the group, on each of them."""
        check_alike(x, group)
        dtype = self._dtype_of_maps()
        if self.tiling is None:
            return in_strips(self, self.config, half, x, group, dtype)
        run = self._encode_tile if half == "encode" else self._decode_tile
        windows = self._windows(self.tiling, half)
        return in_tiles(run, self.config, half, self._enter(x), windows, group, dtype)

    def _windows(self, tiling: Tiling, half: Half) -> tuple[Window, Window]:
        """Those of space and of time."""
        window = pixel_window if half == "encode" else latent_window
        space, time = self.config.spatial_compression_ratio, self.config.temporal_compression_ratio
        return (
            window(tiling.size, tiling.size_stride, space),
            window(tiling.frames, tiling.frames_stride, time),
        )

    def _dtype_of_maps(self) -> torch.dtype:
        weight = self.quant_conv.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def _enter(self, x: Tensor) -> Tensor:
        """x in the dtype of the weights; everything within is channels-last."""
        dtype = self.quant_conv.weight.dtype
        return x.to(dtype).contiguous(memory_format=torch.channels_last_3d)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        y: Tensor
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            y = block(x)
        elif isinstance(block, ResnetBlock) and not torch.compiler.is_compiling():
            # in a checkpoint its last convolution would run again for nothing
            y = block(x, again=True)
        else:
            y = checkpoint(block, x, use_reentrant=False)
        return y

    def _encode_tile(self, video: Tensor, run: Run | None = None) -> Tensor:
        moments = self.encoder(video, run or self._run)
        return causal_conv3d(moments, self.quant_conv.weight, self.quant_conv.bias)

    def _decode_tile(self, z: Tensor, run: Run | None = None) -> Tensor:
        z = causal_conv3d(z, self.post_quant_conv.weight, self.post_quant_conv.bias)
        return self.decoder(z, run or self._run)
