"""Text to video: encode the prompt, walk noise down the noise levels, decode the latents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.text import CLIPTextEncoder, LLMTextEncoder
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.pipelines import folder, parallel
from hunyuan_fast.pipelines.inputs import (
    Limits,
    Progress,
    Request,
    check_defaults,
    read_attention_precision,
    read_device,
    read_dtype,
    read_request,
)
from hunyuan_fast.pipelines.settings import PipelineSettings
from hunyuan_fast.samplers import classifier_free, embedded_guidance, integrate, shifted_sigmas

# A clip larger than one tile of the official window is decoded in tiles.
OFFICIAL_TILE_PIXELS = 256
OFFICIAL_TILE_FRAMES = 64


class HunyuanVideoPipeline:
    """Text-to-video generation with embedded or true guidance (technical report, sections 4 and 5).

    The parts stay reachable as attributes and may be replaced by others of the same sizes.
    Raises ValueError at construction when the parts do not fit together.
    """

    def __init__(
        self,
        transformer: HunyuanVideoTransformer,
        vae: HunyuanVideoVAE,
        text_encoder: LLMTextEncoder,
        text_encoder_2: CLIPTextEncoder,
        settings: PipelineSettings,
    ) -> None:
        self.transformer = transformer.eval()
        self.vae = vae.eval()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.settings = settings
        self.ranks = parallel.Ranks()
        _check_parts(transformer, vae, text_encoder, text_encoder_2)
        check_defaults(self.limits)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        attention_precision: str = "same",
        text_weights: bool = True,
    ) -> "HunyuanVideoPipeline":
        """Load all parts from "nano" (embedded), a folder in a known layout, or a repo id.

        dtype None is float32 on a CPU and bfloat16 on a GPU. With bfloat16 on a GPU the VAE and the
        text encoders run in float16, as in the reference implementation.
        attention_precision is "same" as dtype, or "fp8": video and text then attend to each other
        over e4m3 codes (``transformer.set_attention`` changes it later).
        text_weights False leaves the text encoders without weights, for a process that others
        encode for: ``layout.encodes(rank)`` tells who does.
        Raises TypeError or ValueError for a bad argument and an error naming the file for a bad
        folder.
        """
        device = read_device(device)
        dtype = read_dtype(dtype)
        precision = read_attention_precision(attention_precision)
        parts = folder.load_parts(
            path_or_repo, device=device, dtype=dtype, text_weights=text_weights
        )
        pipeline = cls(*parts)
        pipeline.transformer.set_attention(precision=precision)
        return pipeline

    def save_pretrained(
        self, path: str | Path, *, layout: folder.PipelineLayout = "native"
    ) -> None:
        """Write all parts into a new folder, in our layout ("native") or in that of "diffusers".

        The folder appears whole or not at all. Raises FileExistsError when it is there already and
        not empty.
        """
        folder.save_parts(self, Path(path), layout)

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.ranks.device or next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the transformer."""
        return next(self.transformer.parameters()).dtype

    @property
    def limits(self) -> Limits:
        """What calls of this pipeline may ask for."""
        return Limits(
            transformer=self.transformer.config,
            vae=self.vae.config,
            defaults=self.settings.generation,
        )

    def to(self, device: torch.device | str) -> "HunyuanVideoPipeline":
        """Move all parts to a device; returns the pipeline itself."""
        device = read_device(device)
        for part in (self.transformer, self.vae, self.text_encoder, self.text_encoder_2):
            part.to(device)
        return self

    def parallelize(self, layout: Layout, mesh: DeviceMesh | None = None) -> "HunyuanVideoPipeline":
        """Make videos together with the other processes of the default group.

        Every process loads the same pipeline (with ``text_weights=layout.encodes(rank)``, what it
        keeps of it), calls this with the same layout, and then calls the
        pipeline like the others: rank 0 decides what is made and gets it, the others get nothing.
        mesh: as of ``distributed.mesh.build_mesh``; None makes one
        Returns the pipeline itself. Raises ValueError when the layout fits neither the model nor
        the number of processes.
        """
        parallel.parallelize(self, layout, mesh)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = 6.0,
        true_cfg_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        shift: float | None = None,
        seed: int = 0,
        num_videos: int = 1,
        latents: Tensor | None = None,
        output_type: str = "uint8",
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate num_videos videos for each prompt, B in all, prompts in the outer order.

        height, width: pixels; num_frames: 4n + 1, 1 for an image. None takes the model's default
        num_inference_steps, guidance_scale: None takes the model's default
        guidance_scale: embedded guidance of distilled models
        true_cfg_scale: classifier-free guidance away from negative_prompt, off at 1
        negative_prompt: one for all prompts or one for each; None is the empty prompt
        shift: of the noise levels; None takes the model's, else 7 at 50 steps and 17 below 20
        seed: video i draws its noise from seed + i, in float32 on the CPU, whatever its batch
        latents: noise (B, C, T, H, W) instead of drawn noise, any floating dtype
        progress(stage, step, total): called in the stages "encode", "denoise" and "decode", at
        first with step 0; an exception it raises ends the call

        Returns a CPU tensor, by output_type: "uint8" (B, T, H, W, 3), "float" (B, T, H, W, 3)
        float32 in [0, 1], "latent" (B, C, T, H, W) float32, scaled as the transformer sees it. Of a
        parallelized pipeline rank 0 returns it, and the others an empty tensor.
        Raises TypeError or ValueError naming the argument before any work starts, and
        FloatingPointError naming the step when NaN or infinity appears.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        every = self.ranks.request(lambda: read_request(self.limits, arguments))
        report = progress or _silent
        request = self.ranks.of_group(every)
        noise = self.ranks.noise(lambda: _noise(every), self.device)
        conditions = self.ranks.conditions(lambda: self._encode(request, report), self.device)
        latents = self._denoise(request, noise, conditions, report)
        del conditions
        if request.output_type == "latent":
            made = latents.cpu()
        else:
            made = self._decode(latents, request.output_type, report)
        return self.ranks.videos(made, len(every.prompts))

    def _encode(self, request: Request, report: Progress) -> dict[str, Tensor]:
        """Text inputs for each row of the batch: negative prompts first, then prompts."""
        rows = (*(request.negative_prompts or ()), *request.prompts)
        report("encode", 0, 1)
        if not (self.text_encoder.has_weights and self.text_encoder_2.has_weights):
            raise ValueError(
                "text_weights must be True for the process that encodes the prompts, the first of "
                "each cp x tp group; load the pipeline there with text_weights=True"
            )
        texts = list(dict.fromkeys(rows))
        states, mask = self.text_encoder.encode(
            texts, self.settings.template_for(request.num_frames)
        )
        pooled = self.text_encoder_2.encode(texts)
        _check_finite(states, "the output of the language model", states.dtype)
        _check_finite(pooled, "the output of the CLIP text model", pooled.dtype)
        row = torch.tensor([texts.index(text) for text in rows])
        report("encode", 1, 1)
        return {
            "text_states": states[row.to(states.device)].to(self.device, self.dtype),
            "text_mask": mask[row.to(mask.device)].to(self.device),
            "pooled_text": pooled[row.to(pooled.device)].to(self.device, self.dtype),
        }

    def _denoise(
        self, request: Request, noise: Tensor, conditions: dict[str, Tensor], report: Progress
    ) -> Tensor:
        """Latents (B, C, T, H, W) float32 at noise level 0."""
        steps = request.num_inference_steps
        guidance = None
        if self.transformer.config.guidance_embed:
            rows = len(conditions["text_mask"])
            guidance = embedded_guidance(
                request.guidance_scale, rows, dtype=self.dtype, device=self.device
            )

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            x = x.to(self.dtype)
            if request.negative_prompts is None:
                return self.transformer(x, timestep, **conditions, guidance=guidance)
            both = self.transformer(
                torch.cat([x, x]), timestep.repeat(2), **conditions, guidance=guidance
            )
            negative, positive = both.chunk(2)
            return classifier_free(negative, positive, request.true_cfg_scale)

        def on_step(step: int, v: Tensor, x: Tensor) -> None:
            # a NaN stays to the end, and looking at every step would stall the device each time
            if step in (0, steps - 1):
                at = f"denoising step {step + 1} of {steps}"
                _check_finite(v, f"the velocity of {at}", self.dtype)
                _check_finite(x, f"the latents after {at}", self.dtype)
            report("denoise", step + 1, steps)

        report("denoise", 0, steps)
        return integrate(velocity, noise, shifted_sigmas(steps, request.shift), on_step)

    def _decode(self, latents: Tensor, output_type: str, report: Progress) -> Tensor:
        """Video (B, T, H, W, 3) on the CPU, decoded one by one to bound the memory.

        The processes of one video decode it together; the first of them alone keeps it.
        """
        weight = next(self.vae.parameters())
        frames = []
        report("decode", 0, len(latents))
        with _tiling_if_large(self.vae, latents):
            for index, sample in enumerate(latents):
                z = sample[None].to(weight.device) / self.vae.config.scaling_factor
                video = self.vae.decode(z.to(weight.dtype), group=self.ranks.video)[0]
                _check_finite(video, f"the decoded video {index}", weight.dtype)
                if self.ranks.is_first_of_video:
                    frames.append(_to_frames(video, output_type))
                report("decode", index + 1, len(latents))
        return torch.stack(frames) if frames else torch.empty(0)


@contextmanager
def _tiling_if_large(vae: HunyuanVideoVAE, latents: Tensor) -> Iterator[None]:
    """Decode in official tiles inside the block if a clip exceeds one and none were chosen."""
    frames, *sides = latents.shape[2:]
    large = max(sides) * vae.config.spatial_compression_ratio > OFFICIAL_TILE_PIXELS
    long = (frames - 1) * vae.config.temporal_compression_ratio + 1 > OFFICIAL_TILE_FRAMES
    if vae.tiling is not None or not (large or long):
        yield
        return
    vae.enable_tiling("official")
    try:
        yield
    finally:
        vae.disable_tiling()


def _noise(request: Request) -> Tensor:
    """Standard normal noise (B, C, T, H, W) in float32, from one CPU generator per video.

    Drawn on the CPU, so that a seed names one video on every machine and in every batch.
    """
    if request.latents is not None:
        return request.latents
    shape = request.latent_shape[1:]
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in request.seeds
        ]
    )


def _to_frames(video: Tensor, output_type: str) -> Tensor:
    """Frames (T, H, W, 3) on the CPU of a video (3, T, H, W) in [-1, 1]; uint8 is truncated."""
    frames = (video.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    if output_type == "uint8":
        frames = (frames * 255).to(torch.uint8)
    return frames.contiguous().cpu()


def _check_finite(x: Tensor, what: str, dtype: torch.dtype) -> None:
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return
    index = (~finite).nonzero()[0].tolist()
    raise FloatingPointError(
        f"{what} holds {x[tuple(index)].item()} at index {index}; it was computed in {dtype}: load "
        "the models in float32, or bfloat16 instead of float16, and else check the weights"
    )


def _check_parts(
    transformer: HunyuanVideoTransformer,
    vae: HunyuanVideoVAE,
    llm: LLMTextEncoder,
    clip: CLIPTextEncoder,
) -> None:
    config = transformer.config
    widths = {
        "vae.latent_channels": (vae.config.latent_channels, config.in_channels, "in_channels"),
        "transformer.out_channels": (config.out_channels, config.in_channels, "in_channels"),
        "text_encoder": (llm.dim, config.text_states_dim, "text_states_dim"),
        "text_encoder_2": (clip.dim, config.text_states_dim_2, "text_states_dim_2"),
    }
    for part, (got, expected, name) in widths.items():
        if got != expected:
            raise ValueError(
                f"{part} must have the width transformer.{name} = {expected}, got {got}; "
                "the parts belong to different models"
            )


def _silent(stage: str, step: int, total: int) -> None:
    """The progress callback of a call without one."""
