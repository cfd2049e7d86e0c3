"""Stages "dit" and "guidance": flow matching from images to clips, then guidance distillation."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.text import CLIPTextEncoder, LLMTextEncoder
from hunyuan_fast.samplers.guidance import classifier_free
from hunyuan_fast.trainer.loop import step_generator
from hunyuan_fast.trainer.nano.latents import LatentSet
from hunyuan_fast.trainer.objectives import add_noise, flow_matching_loss, logit_normal_sigmas
from hunyuan_fast.trainer.share import ALONE, Share


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching: first images only, then clips with one step in ``image_every`` of images."""

    image_steps: int
    clip_steps: int
    image_batch: int = 64
    clip_batch: int = 32
    image_every: int = 5
    shift: float = 2.0
    drop_caption: float = 0.1


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Guidance distillation: scales drawn evenly from ``scales`` (section 5.2: 1 to 8)."""

    steps: int
    batch: int = 16
    scales: tuple[float, float] = (1.0, 8.0)
    shift: float = 2.0


class Prompts(Protocol):
    """Captions to (states (B, L, D), mask (B, L), pooled (B, P)), on ``device``."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]: ...


class FrozenPrompts:
    """The two trained text encoders, cut to the longest caption of a batch to save work."""

    def __init__(self, llm: LLMTextEncoder, clip: CLIPTextEncoder) -> None:
        self.llm = llm
        self.clip = clip

    @property
    def device(self) -> torch.device:
        return self.llm.device

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        states, mask = self.llm.encode(captions)
        longest = int(mask.sum(1).max())
        return states[:, :longest], mask[:, :longest], self.clip.encode(captions)


def guidance_input(scales: Tensor) -> Tensor:
    """Embedded guidance (B,) as the transformer takes it."""
    return 1000.0 * scales


class FlowStage:
    """Trains the transformer to predict noise - data on latents scaled by the VAE's factor."""

    name = "dit"

    def __init__(
        self,
        model: HunyuanVideoTransformer,
        prompts: Prompts,
        images: LatentSet,
        clips: LatentSet,
        config: FlowConfig,
        *,
        scaling_factor: float,
        seed: int,
        share: Share = ALONE,
    ) -> None:
        self.module = model
        self.share = share
        self.prompts = prompts
        self.images = images
        self.clips = clips
        self.config = config
        self.scaling_factor = scaling_factor
        self.seed = seed

    def _is_image(self, step: int) -> bool:
        late = step >= self.config.image_steps
        return not late or step % self.config.image_every == self.config.image_every - 1

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        image = self._is_image(step)
        source = self.images if image else self.clips
        batch = self.config.image_batch if image else self.config.clip_batch
        generator = step_generator(self.seed, self.name, step)
        data, captions = draw(source, batch, step, self.config.drop_caption, generator)
        data = data * self.scaling_factor
        noise = torch.randn(data.shape, generator=generator)
        sigmas = logit_normal_sigmas(batch, shift=self.config.shift, generator=generator)
        rows, device = self.share.rows(batch), self.prompts.device
        captions = captions[rows]
        data, noise, sigmas = (x[rows].to(device) for x in (data, noise, sigmas))
        # plain conditional targets are guidance at scale 1
        scale = guidance_input(torch.ones_like(sigmas))
        with torch.autocast(device.type, torch.bfloat16):
            velocity = self.module(
                add_noise(data, noise, sigmas), 1000 * sigmas, *self.prompts(captions), scale
            )
        loss = flow_matching_loss(velocity, data, noise) * self.share.weight(batch)
        return loss, {"image_loss" if image else "clip_loss": loss.item()}


def draw(
    source: LatentSet, batch: int, step: int, drop_caption: float, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Latents (B, C, T, H, W) fp32 and captions, some emptied for unconditional training.

    Short captions come first: attention on the CPU makes one call per run of equal lengths.
    """
    chosen = torch.randint(len(source), (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < drop_caption
    pairs = [
        (index, "" if drop else source.caption(index, variant=step))
        for index, drop in zip(chosen.tolist(), dropped.tolist(), strict=True)
    ]
    pairs.sort(key=lambda pair: len(pair[1].split()))
    rows = torch.tensor([index for index, _ in pairs])
    return source.latents[rows].float(), [caption for _, caption in pairs]


class DistillationStage:
    """Trains a copy of the transformer to give in one pass what guidance gives in two.

    Source: technical report, section 5.2 (text-guidance distillation).
    """

    name = "guidance"

    def __init__(
        self,
        student: HunyuanVideoTransformer,
        teacher: HunyuanVideoTransformer,
        prompts: Prompts,
        clips: LatentSet,
        config: DistillationConfig,
        *,
        scaling_factor: float,
        seed: int,
        share: Share = ALONE,
    ) -> None:
        self.module = student
        self.share = share
        self.teacher = teacher.eval().requires_grad_(False)
        self.prompts = prompts
        self.clips = clips
        self.config = config
        self.scaling_factor = scaling_factor
        self.seed = seed

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.config.batch
        generator = step_generator(self.seed, self.name, step)
        data, captions = draw(self.clips, batch, step, 0.0, generator)
        data = data * self.scaling_factor
        noise = torch.randn(data.shape, generator=generator)
        sigmas = logit_normal_sigmas(batch, shift=self.config.shift, generator=generator)
        low, high = self.config.scales
        scales = low + (high - low) * torch.rand(batch, generator=generator)
        rows, device = self.share.rows(batch), self.prompts.device
        noisy = add_noise(data, noise, sigmas)[rows].to(device)
        times, scales = 1000 * sigmas[rows].to(device), scales[rows].to(device)
        states, mask, pooled = self.prompts(captions[rows])
        with torch.autocast(device.type, torch.bfloat16):
            target = self._guided(noisy, times, states, mask, pooled, scales)
            velocity = self.module(noisy, times, states, mask, pooled, guidance_input(scales))
        return F.mse_loss(velocity.float(), target) * self.share.weight(batch), {}

    @torch.no_grad()
    def _guided(
        self,
        noisy: Tensor,
        times: Tensor,
        states: Tensor,
        mask: Tensor,
        pooled: Tensor,
        scales: Tensor,
    ) -> Tensor:
        one = guidance_input(torch.ones_like(scales))
        empty, empty_mask, empty_pooled = self.prompts([""] * len(noisy))
        positive = self.teacher(noisy, times, states, mask, pooled, one)
        negative = self.teacher(noisy, times, empty, empty_mask, empty_pooled, one)
        rows = zip(negative, positive, scales.tolist(), strict=True)
        return torch.stack([classifier_free(no, yes, scale) for no, yes, scale in rows])
