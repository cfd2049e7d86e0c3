"""What a text-to-video call may ask for: one table of arguments, read before any heavy work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.modules.attention import PRECISIONS
from hunyuan_fast.pipelines.readers import (
    Choice,
    Integer,
    Number,
    Optional,
    Reader,
    Text,
    callback,
    show,
    wrong_type,
    wrong_value,
)
from hunyuan_fast.pipelines.settings import (
    GUIDANCE,
    MAX_FRAMES,
    MAX_SIDE,
    SHIFT,
    STEPS,
    GenerationDefaults,
)

OUTPUT_TYPES = ("uint8", "float", "latent")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SEED = 2**63 - 1
MAX_BATCH = 1024
MAX_PROMPT_CHARACTERS = 100_000
# 18 times the 118 800 tokens of 720 x 1280 x 129: attention over more ends in no useful time.
MAX_VIDEO_TOKENS = 2**21

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A call that has passed every check; tuples have one entry for each of the B videos."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    shift: float | None
    seeds: tuple[int, ...]
    latents: Tensor | None
    latent_shape: tuple[int, int, int, int, int]
    output_type: str
    progress: Progress | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the models of a pipeline can take, and the values that stand for None."""

    transformer: TransformerConfig
    vae: VAEConfig
    defaults: GenerationDefaults

    @property
    def size_multiples(self) -> tuple[int, int, int]:
        """Steps of frames, height, width: the VAE's compression times the transformer's patch."""
        time, height, width = self.transformer.patch_size
        space = self.vae.spatial_compression_ratio
        return time * self.vae.temporal_compression_ratio, height * space, width * space

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents (C, T, H, W) of a clip."""
        space = self.vae.spatial_compression_ratio
        frames = (num_frames - 1) // self.vae.temporal_compression_ratio + 1
        return self.transformer.in_channels, frames, height // space, width // space


def argument_table(limits: Limits) -> dict[str, Reader]:
    """The reader of every argument that stands on its own."""
    frames, height, width = limits.size_multiples
    # The first frame is a latent of its own: T = 4n + 1 for the released model.
    first = 1 + (limits.transformer.patch_size[0] - 1) * limits.vae.temporal_compression_ratio
    text = Text(MAX_PROMPT_CHARACTERS)
    return {
        "prompt": _Prompts(text),
        "negative_prompt": Optional(_Prompts(text)),
        "height": Integer(height, MAX_SIDE, multiple=height, unit=" pixels"),
        "width": Integer(width, MAX_SIDE, multiple=width, unit=" pixels"),
        "num_frames": Integer(first, MAX_FRAMES, multiple=frames, remainder=first),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "true_cfg_scale": Number(1, 100, advice="1 switches classifier-free guidance off"),
        "shift": SHIFT,
        "seed": Integer(0, MAX_SEED),
        "num_videos": Integer(1, MAX_BATCH),
        "output_type": Choice(OUTPUT_TYPES),
        "progress": Optional(callback),
    }


def read_request(limits: Limits, arguments: Mapping[str, Any]) -> Request:
    """Check all arguments of a call, alone and together, and return them in plain form.

    None for a size, the number of steps or the guidance scale takes the model's default.
    Raises TypeError or ValueError naming the argument, what was expected, what was given and what
    to do.
    """
    given = dict(arguments)
    for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "shift"):
        if given[name] is None:
            given[name] = getattr(limits.defaults, name)
    latents = given.pop("latents")
    value = {name: reader(name, given[name]) for name, reader in argument_table(limits).items()}

    each = value.pop("prompt")
    num_videos, seed, negative = (
        value.pop(name) for name in ("num_videos", "seed", "negative_prompt")
    )
    negative = _negative_prompts(negative, len(each), value["true_cfg_scale"])
    prompts = _repeat(each, num_videos)
    _check_size(limits, value)
    _check_guidance(limits, value)
    if seed + len(prompts) - 1 > MAX_SEED:
        wrong_value("seed", f"at most {MAX_SEED} - {len(prompts) - 1}, video i uses seed + i", seed)
    shape = limits.latent_shape(value["num_frames"], value["height"], value["width"])
    latent_shape = (len(prompts), *shape)
    return Request(
        prompts=prompts,
        negative_prompts=None if negative is None else _repeat(negative, num_videos),
        seeds=tuple(seed + i for i in range(len(prompts))),
        latents=None if latents is None else _check_latents(latents, latent_shape),
        latent_shape=latent_shape,
        **value,
    )


def check_defaults(limits: Limits) -> None:
    """Raise ValueError when the settings ask for a size that the models cannot make."""
    table = argument_table(limits)
    for name in ("height", "width", "num_frames"):
        table[name](f"settings.generation.{name}", getattr(limits.defaults, name))


def read_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A data type the models run in, given as torch.dtype or by name; None stays None."""
    if value is None:
        return None
    expected = "one of " + ", ".join(DTYPES)
    if isinstance(value, str):
        if value not in DTYPES:
            wrong_value("dtype", expected, value)
        return DTYPES[value]
    if not isinstance(value, torch.dtype):
        wrong_type("dtype", f"a torch.dtype ({expected})", value)
    if value not in DTYPES.values():
        wrong_value("dtype", expected, value)
    return value


def read_attention_precision(value: str) -> str:
    """How the transformer's joint attention computes: "same" as its weights, or "fp8"."""
    return Choice(PRECISIONS)("attention_precision", value)


def read_device(value: torch.device | str) -> torch.device:
    """A device that is there; raises ValueError for CUDA without a GPU and for "meta"."""
    if not isinstance(value, (str, torch.device)):
        wrong_type("device", 'a device such as "cpu" or "cuda"', value)
    try:
        device = torch.device(value)
    except RuntimeError:
        wrong_value("device", 'a device such as "cpu", "cuda" or "cuda:1"', value)
    if device.type not in ("cpu", "cuda"):
        wrong_value("device", "a CPU or CUDA device", str(device))
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            wrong_value(
                "device",
                f"one of the {count} CUDA devices here",
                str(device),
                'use "cpu" or another GPU',
            )
    return device


@dataclass(frozen=True)
class _Prompts:
    """A string, or a list of strings that is not empty; returns a tuple."""

    text: Text

    def __call__(self, name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, (str, bytes)):
            return (self.text(name, value),)
        if not isinstance(value, (list, tuple)):
            wrong_type(name, "a string or a list of strings", value)
        if not 1 <= len(value) <= MAX_BATCH:
            raise ValueError(f"{name} must hold 1 to {MAX_BATCH} strings, got {len(value)}")
        return tuple(self.text(f"{name}[{i}]", item) for i, item in enumerate(value))


def _repeat(each: tuple[str, ...], num_videos: int) -> tuple[str, ...]:
    """Each prompt num_videos times in a row."""
    if len(each) * num_videos > MAX_BATCH:
        raise ValueError(
            f"num_videos must be at most {MAX_BATCH // len(each)} for {len(each)} prompts "
            f"({MAX_BATCH} videos in one call), got {num_videos}; make several calls"
        )
    return tuple(prompt for prompt in each for _ in range(num_videos))


def _negative_prompts(
    negative: tuple[str, ...] | None, num_prompts: int, true_cfg_scale: float
) -> tuple[str, ...] | None:
    """One negative prompt per prompt, empty by default; None without classifier-free guidance."""
    if true_cfg_scale == 1:
        if negative is not None:
            raise ValueError(
                f"negative_prompt must be None with true_cfg_scale 1, got {show(negative[0])}; "
                "set true_cfg_scale above 1 for it to take effect"
            )
        return None
    if negative is None:
        negative = ("",)
    if len(negative) == 1:
        return negative * num_prompts
    if len(negative) != num_prompts:
        raise ValueError(
            f"negative_prompt must be one string or {num_prompts} as prompt, got {len(negative)}"
        )
    return negative


def _check_size(limits: Limits, value: Mapping[str, Any]) -> None:
    _, *grid = limits.latent_shape(value["num_frames"], value["height"], value["width"])
    tokens = 1
    for size, patch in zip(grid, limits.transformer.patch_size, strict=True):
        tokens *= size // patch
    if tokens > MAX_VIDEO_TOKENS:
        raise ValueError(
            f"height, width and num_frames must give at most {MAX_VIDEO_TOKENS} video tokens, "
            f"got {tokens} from {value['height']} x {value['width']} x {value['num_frames']}; "
            "ask for a smaller or shorter video"
        )


def _check_guidance(limits: Limits, value: Mapping[str, Any]) -> None:
    """Refuse a scale that the model cannot read, save for the usual defaults."""
    harmless = (1.0, GenerationDefaults.guidance_scale, limits.defaults.guidance_scale)
    if not limits.transformer.guidance_embed and value["guidance_scale"] not in harmless:
        wrong_value(
            "guidance_scale",
            f"left at {limits.defaults.guidance_scale:g}: this model has no guidance embedding",
            value["guidance_scale"],
            "use true_cfg_scale for guidance",
        )


def _check_latents(latents: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise given by the caller, (B, C, T, H, W), finite; any floating dtype, read as float32."""
    if not isinstance(latents, Tensor):
        wrong_type("latents", f"a floating-point tensor of shape {shape}", latents)
    if not latents.is_floating_point():
        raise TypeError(
            f"latents must be a floating-point tensor, got {latents.dtype}; use torch.randn"
        )
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"latents must be (B, C, T, H, W) = {shape} for these prompts and this size, got "
            f"{tuple(latents.shape)}; change them, or height, width, num_frames and num_videos"
        )
    if latents.device.type == "meta":
        raise ValueError(
            "latents must hold data, got a tensor on the meta device; use the CPU or a GPU"
        )
    latents = latents.detach().float()
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        raise ValueError(
            f"latents must be finite, got {bad} NaN or infinite values; draw them with torch.randn"
        )
    return latents
