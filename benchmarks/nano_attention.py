"""What a cheaper attention costs the embedded model: prompts followed, latents changed.

    python -m benchmarks.nano_attention --prompts 72
    python -m benchmarks.nano_attention --windows a.json b.json    # of calibrate-attention

Generates the same held-out prompts with every choice below, lets the judge read colour, shape and
direction off the pixels, and compares the latents with those of float32: PSNR, with the range of
those of all clips as the peak. The mean is over clips, the least that of the worst clip.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.pipelines import HunyuanVideoPipeline
from hunyuan_fast.trainer.nano.evaluate import accuracy, held_out_prompts, run_trials

# Data type of the model, precision of its attention; the first is what others are compared with.
CHOICES = (("float32", "same"), ("float32", "fp8"), ("bfloat16", "same"), ("bfloat16", "fp8"))


@dataclass
class Keeping:
    """A pipeline that keeps the latents of what it generates."""

    pipe: HunyuanVideoPipeline
    latents: list[Tensor] = field(default_factory=list)

    def __call__(self, prompt: Sequence[str], *, seed: int) -> Tensor:
        latents = self.pipe(prompt, seed=seed, num_inference_steps=None, output_type="latent")
        self.latents.extend(latents)
        weight = next(self.pipe.vae.parameters())
        with torch.no_grad():
            z = latents.to(weight) / self.pipe.vae.config.scaling_factor
            video = self.pipe.vae.decode(z).float()
        frames = (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
        return (frames * 255).to(torch.uint8).cpu()


def psnr(latents: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """PSNR in dB of each clip's latents, inf for equal ones; the peak is the range of them all."""
    whole = torch.stack(tuple(reference))
    peak = whole.max() - whole.min()
    errors = (torch.stack(tuple(latents)) - whole).square().flatten(1).mean(1)
    return (10 * torch.log10(peak.square() / errors)).tolist()


def main() -> None:
    """Generate with every choice, judge, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--windows",
        type=Path,
        nargs="*",
        default=[],
        help="sparse, with these files, in place of fp8",
    )
    options = parser.parse_args()
    choices: Sequence[tuple[str, str | Path]] = CHOICES
    if options.windows:
        choices = (CHOICES[0], *(("float32", path) for path in options.windows))

    prompts = held_out_prompts(options.prompts)
    titles = ("weights", "attention", "colour", "shape", "direction", "all")
    table = Table(*titles, "PSNR, mean", "least", "seconds")
    reference: list[Tensor] = []
    for dtype, attention in choices:
        pipe = HunyuanVideoPipeline.from_pretrained("nano", device=options.device, dtype=dtype)
        if isinstance(attention, Path):
            pipe.transformer.set_attention(windows=AttentionWindows.load(attention))
        else:
            pipe.transformer.set_attention(precision=attention)
        keeping = Keeping(pipe)
        start = time.perf_counter()
        shares = accuracy(run_trials(keeping, prompts))
        seconds = time.perf_counter() - start
        reference = reference or keeping.latents
        values = psnr(keeping.latents, reference)
        table.add_row(
            *(dtype, attention.stem if isinstance(attention, Path) else attention),
            *(f"{shares[name]:.1%}" for name in titles[2:]),
            *(f"{value:.1f} dB" for value in (sum(values) / len(values), min(values))),
            f"{seconds:.0f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
