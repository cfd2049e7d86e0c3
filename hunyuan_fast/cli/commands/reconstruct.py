"""Send a clip through the VAE and back, and tell how much of it survives.

The clip is cut to its first 4n + 1 frames and cropped around its centre until height and width are
multiples of 8. With --height or --width it is scaled first: one of them keeps the aspect ratio,
both are covered and the rest is cropped. PSNR and SSIM compare what enters the VAE with what
leaves it, in 8-bit RGB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from hunyuan_fast.cli.errors import UsageError
from hunyuan_fast.cli.outputs import output_paths, tried
from hunyuan_fast.cli.parsing import OptionalFile, OptionalInt, OptionalText, parse
from hunyuan_fast.cli.placement import read_place
from hunyuan_fast.cli.record import record

if TYPE_CHECKING:
    from torch import Tensor

    from hunyuan_fast.cli.stages import Stages
    from hunyuan_fast.models import HunyuanVideoVAE

# The largest clip that is sent through in one piece: one tile of the official window.
_TILE_PIXELS, _TILE_FRAMES = 256, 64


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast reconstruct`` takes."""

    clip: Annotated[Positional[Path], arg(metavar="CLIP")]
    """Video file to read."""
    out: OptionalFile = None
    """Video file to write (.mp4). Default: the next free reconstruction-0001.mp4."""
    model: Annotated[str, arg(metavar="nano|FOLDER|REPO")] = "nano"
    """Whose VAE: the embedded nano, a model or VAE folder, or a Hugging Face repo id."""
    frames: OptionalInt = None
    """Number of frames, 4n + 1. Default: as many as the clip has."""
    height: OptionalInt = None
    """Height to scale to, a multiple of 8."""
    width: OptionalInt = None
    """Width to scale to, a multiple of 8."""
    tiling: Literal["auto", "official", "diffusers", "none"] = "auto"
    """Work in overlapping tiles; auto: official above 256 pixels or 64 frames."""
    side_by_side: bool = False
    """Write the clip on the left and its reconstruction on the right."""
    dtype: OptionalText = None
    """float32, bfloat16 or float16. Default: float32 on a CPU, float16 on a GPU."""
    device: OptionalText = None
    """cpu, cuda or cuda:N. Default: a GPU if there is one."""
    overwrite: bool = False
    """Replace a file that exists."""
    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Read, fit, encode, decode, compare, write."""
    options = parse(Options, argv, "reconstruct", __doc__)
    if options.frames is not None and (options.frames < 1 or options.frames % 4 != 1):
        below = max(options.frames - 1, 0) // 4 * 4 + 1
        raise UsageError(
            f"--frames must be 4n + 1, got {options.frames}; use {below} or {below + 4}"
        )
    for name, side in (("--height", options.height), ("--width", options.width)):
        if side is not None and (side < 8 or side % 8):
            near = max(round(side / 8), 1) * 8
            raise UsageError(f"{name} must be a positive multiple of 8, got {side}; use {near}")

    import torch

    from hunyuan_fast.cli.stages import Stages, console
    from hunyuan_fast.data.metrics import psnr, ssim
    from hunyuan_fast.data.video import write_video
    from hunyuan_fast.models import HunyuanVideoVAE

    device, dtype = read_place(options.device, options.dtype)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    (path,) = output_paths(options.out, 1, ".mp4", stem="reconstruction")
    clip, fps = _read(options)
    with (
        tried((path,), overwrite=options.overwrite, size=3 * clip.numel() + 2**20),
        Stages(str(device), console(stderr=True)) as stages,
    ):
        with stages.stage("load"):
            vae = HunyuanVideoVAE.from_pretrained(
                options.model, subfolder=None, device=device, dtype=dtype
            )
        tiling = _choose_tiling(vae, options.tiling, clip)
        result = round_trip(vae, clip, stages)
        with stages.stage("compare"):
            scores = {"psnr": psnr(result, clip), "ssim": ssim(result, clip)}
        shown = torch.cat([clip, result], dim=2) if options.side_by_side else result
        metadata = record(
            command="reconstruct",
            source=options.clip.name,
            model=options.model,
            tiling=tiling,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            **scores,
        )
        with stages.stage("write"):
            write_video(path, shown, fps, metadata, overwrite=options.overwrite)
    count, height, width, _ = clip.shape
    print(f"{path}  {width}x{height}, {count} frames, {fps:g} fps, tiling {tiling}")
    print(f"PSNR {scores['psnr']:.2f} dB  SSIM {scores['ssim']:.4f}")
    console().print(stages.table())


def _read(options: Options) -> "tuple[Tensor, float]":
    """The part of the clip that fits the VAE: frames (T, H, W, 3) uint8, frames per second."""
    from hunyuan_fast.data.geometry import apply_fit, fit, whole_frames
    from hunyuan_fast.data.video import read_video

    frames, fps = read_video(options.clip, max_frames=options.frames)
    count = whole_frames(len(frames))
    if options.frames is not None and count < options.frames:
        raise UsageError(
            f"--frames must be at most {count} for {options.clip}, which has {len(frames)} "
            f"frames, got {options.frames}"
        )
    height, width = frames.shape[1:3]
    plan = fit(height, width, to_height=options.height, to_width=options.width, multiple=8)
    return apply_fit(frames[:count], plan), fps


def _choose_tiling(vae: "HunyuanVideoVAE", choice: str, clip: "Tensor") -> str:
    """Set the VAE's tiling and return its name."""
    if choice == "auto":
        large = max(clip.shape[1:3]) > _TILE_PIXELS or len(clip) > _TILE_FRAMES
        choice = "official" if large else "none"
    if choice == "none":
        vae.disable_tiling()
    else:
        vae.enable_tiling(choice)
    return choice


def round_trip(vae: "HunyuanVideoVAE", clip: "Tensor", stages: "Stages") -> "Tensor":
    """Encode and decode frames (T, H, W, 3) uint8 by the posterior's mean; the same shape back.

    Raises FloatingPointError when the VAE returns NaN or infinity.
    """
    import torch

    weight = next(vae.parameters())
    with torch.no_grad():
        with stages.stage("encode"):
            video = clip.permute(3, 0, 1, 2)[None].to(weight.device, torch.float32) / 127.5 - 1
            latents = vae.encode(video.to(weight.dtype)).mode()
        with stages.stage("decode"):
            video = vae.decode(latents)[0].float()
    if not bool(torch.isfinite(video).all()):
        raise FloatingPointError(
            f"the VAE returned NaN or infinity in {weight.dtype}; use --dtype float32, and if "
            "that does not help check the weights"
        )
    pixels = ((video + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
