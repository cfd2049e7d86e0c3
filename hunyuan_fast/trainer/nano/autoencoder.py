"""Stage "vae": the causal 3D VAE, from low resolution and short to full size and length."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hunyuan_fast.data.shapes.batches import sample, to_float
from hunyuan_fast.data.shapes.render import render
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.models.vae.posterior import DiagonalGaussian
from hunyuan_fast.trainer.loop import hash_seed, step_generator
from hunyuan_fast.trainer.share import ALONE, Share


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the curriculum: ``batch`` clips of ``frames`` x ``size`` x ``size`` a step."""

    steps: int
    frames: int
    size: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The objective: L1 + square_weight * L2 + kl_weight * KL per latent value.

    Technical report, equation 1, without its perceptual and adversarial terms: both need networks
    trained on photographs. The squared error stands in for them, since L1 alone is content to draw
    the background and leaves small things out: 24.6 dB against 19.3 dB after 300 steps. One step in
    five is images, the report's 4:1 mixture (section 4.1.1).

    gradient_checkpointing: less memory, more time, the same weights bit for bit.
    """

    phases: tuple[Phase, ...]
    square_weight: float = 2.0
    kl_weight: float = 1e-4
    image_every: int = 5
    image_batch: int = 8
    clip_frames: int = 17
    clip_size: int = 96
    gradient_checkpointing: bool = False


def _temporal_kernels(vae: HunyuanVideoVAE) -> list[Tensor]:
    """The kernels (O, I, t, h, w) that reach into the past."""
    return [m.weight for m in vae.modules() if isinstance(m, nn.Conv3d) and m.kernel_size[0] > 1]


@torch.no_grad()
def init_autoencoder(vae: HunyuanVideoVAE) -> None:
    """Start as a nearly noiseless network that sees each frame by itself.

    Residual branches begin at zero. The posterior begins with a standard deviation of 0.05, since
    at torch's default of 1 the noise drowns the mean and a small network never finds it. Of the
    temporal taps only that of the present frame begins above zero.
    """
    for kernel in _temporal_kernels(vae):
        kernel[:, :, -1] *= kernel.shape[2] ** 0.5
        kernel[:, :, :-1] = 0.0
    for name, p in vae.named_parameters():
        if ".conv2." in name or ".to_out." in name:
            p.zero_()
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[vae.config.latent_channels :] = -6.0


class Reconstruction(nn.Module):
    """A VAE from clips to clips by way of drawn latents: what a training step calls."""

    def __init__(self, vae: HunyuanVideoVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, video: Tensor, generator: torch.Generator, batch: int, rows: slice
    ) -> tuple[DiagonalGaussian, Tensor]:
        """The posterior and the decoded clips of ``rows`` of a batch, for which noise is drawn."""
        posterior = self.vae.encode(video)
        shape, dtype = (batch, *posterior.mean.shape[1:]), posterior.mean.dtype
        noise = torch.randn(shape, generator=generator, dtype=dtype)[rows].to(video.device)
        return posterior, self.vae.decode(
            posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        )


class AutoencoderStage:
    """Trains a VAE to reproduce rendered clips."""

    name = "vae"

    def __init__(
        self, vae: HunyuanVideoVAE, config: AutoencoderConfig, *, seed: int, share: Share = ALONE
    ) -> None:
        self.module = vae
        self.network = Reconstruction(vae)
        self.share = share
        self.config = config
        self.seed = seed
        self._image = False
        vae.enable_gradient_checkpointing(config.gradient_checkpointing)
        for kernel in _temporal_kernels(vae):
            kernel.register_hook(self._present_only)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.config.phases)

    def _present_only(self, gradient: Tensor) -> Tensor:
        """Let images train the tap of the present frame alone.

        A single frame gives every temporal tap the same gradient, and taps that are alike blur
        clips in time: after image training a clip came back at 17 dB, its motion gone, and at 21
        to 29 dB when the same kernels were moved into the last tap.
        """
        if not self._image:
            return gradient
        masked = torch.zeros_like(gradient)
        masked[:, :, -1] = gradient[:, :, -1]
        return masked

    def _phase(self, step: int) -> Phase:
        for phase in self.config.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.config.phases[-1]

    def _crop(self, step: int, item: int, frames: int, size: int) -> Tensor:
        """A random window in space and time of one rendered clip, (3, frames, size, size)."""
        full = self.config.clip_size
        seed = hash_seed(self.seed, self.name, step)
        scene, _ = sample(seed, item)
        rng = np.random.default_rng((seed, item, 1))
        # frames are taken 1 to 3 apart where there are enough (technical report, 4.1.1: 1 to 8)
        stride = int(
            rng.integers(1, max(1, min(3, (self.config.clip_frames - 1) // max(1, frames - 1))) + 1)
        )
        clip = render(scene, num_frames=self.config.clip_frames, height=full, width=full)
        first = int(rng.integers(0, self.config.clip_frames - stride * (frames - 1)))
        top, left = (int(v) for v in rng.integers(0, full - size + 1, size=2))
        window = clip[
            first : first + stride * (frames - 1) + 1 : stride, top : top + size, left : left + size
        ]
        return to_float(np.ascontiguousarray(window))

    def batch(self, step: int) -> tuple[Tensor, int]:
        """The clips of this process, (B, 3, T, H, W), and how many all processes have."""
        phase = self._phase(step)
        if step % self.config.image_every == self.config.image_every - 1:
            frames, size, count = 1, self.config.clip_size, self.config.image_batch
        else:
            frames, size, count = phase.frames, phase.size, phase.batch
        items = range(count)[self.share.rows(count)]
        return torch.stack([self._crop(step, item, frames, size) for item in items]), count

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        video, batch = self.batch(step)
        video = video.to(next(self.module.parameters()).device)
        rows, weight = self.share.rows(batch), self.share.weight(batch)
        generator = step_generator(self.seed, self.name, step)
        self._image = video.shape[2] == 1
        with torch.autocast(video.device.type, torch.bfloat16):
            posterior, decoded = self.network(video, generator, batch, rows)
        error = decoded.float() - video
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        square = error.square().mean()
        loss = error.abs().mean() + self.config.square_weight * square + self.config.kl_weight * kl
        # values span 2, so the peak signal is 2
        psnr = 10 * torch.log10(4 / square.detach())
        kind = "image" if self._image else "clip"
        figures = {f"{kind}_psnr": psnr.item() * weight, "kl": kl.item() * weight}
        return loss * weight, figures
