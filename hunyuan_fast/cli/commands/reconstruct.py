"""Send a clip through the VAE and back, and tell how much of it survives.

The clip is cut to its first 4n + 1 frames and cropped around its centre until height and width are
multiples of 8. With --height or --width it is scaled first: one of them keeps the aspect ratio,
both are covered and the rest is cropped. PSNR and SSIM compare what enters the VAE with what
leaves it, in 8-bit RGB. With --memory-budget the whole clip goes through at once where that fits,
else in chunks of frames: the same result in less memory and more time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from hunyuan_fast.cli.errors import CommandError, UsageError
from hunyuan_fast.cli.outputs import output_paths, tried
from hunyuan_fast.cli.parsing import OptionalFile, OptionalInt, OptionalText, parse
from hunyuan_fast.cli.placement import read_place
from hunyuan_fast.cli.record import record

if TYPE_CHECKING:
    from torch import Tensor

    from hunyuan_fast.cli.stages import Stages
    from hunyuan_fast.models import HunyuanVideoVAE
    from hunyuan_fast.models.vae.plan import Plan

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
    memory_budget: OptionalText = None
    """Most memory beside the program and the weights, such as 6GiB or 500MB; no tiles then."""
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
    budget = _read_budget(options)
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
        tiling = _choose_tiling(vae, "none" if budget else options.tiling, clip)
        plans = None if budget is None else plan_round_trip(vae, clip, budget)
        for plan in plans or ():
            console(stderr=True).print(plan.summary())
        result = round_trip(vae, clip, stages, plans)
        with stages.stage("compare"):
            scores = {"psnr": psnr(result, clip), "ssim": ssim(result, clip)}
        shown = torch.cat([clip, result], dim=2) if options.side_by_side else result
        metadata = record(
            command="reconstruct",
            source=options.clip.name,
            model=options.model,
            tiling=tiling,
            **{"memory-budget": options.memory_budget},
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


def _read_budget(options: Options) -> int | None:
    """The bytes of --memory-budget."""
    from hunyuan_fast.models.vae.budget import read_bytes

    if options.memory_budget is None:
        return None
    if options.tiling not in ("auto", "none"):
        raise UsageError(
            f"--tiling must be none with --memory-budget, which works on the whole clip, got "
            f"{options.tiling}"
        )
    try:
        return read_bytes(options.memory_budget, "--memory-budget")
    except ValueError as error:
        raise UsageError(str(error)) from error


def plan_round_trip(vae: "HunyuanVideoVAE", clip: "Tensor", budget: int) -> "tuple[Plan, Plan]":
    """How to encode and decode frames (T, H, W, 3) within a budget that the frames count towards.

    Raises CommandError naming the least budget that works.
    """
    from hunyuan_fast.models.vae.budget import show_bytes
    from hunyuan_fast.models.vae.planner import least_budget, plan_decode, plan_encode

    config, weight = vae.config, next(vae.parameters())
    count, height, width, channels = clip.shape
    space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
    video = (1, channels, count, height, width)
    latents = (
        *(1, config.latent_channels, (count - 1) // time + 1),
        *(height // space, width // space),
    )
    # beside the VAE: the clip in bytes, in host memory, and until it is encoded as numbers
    frames = clip.numel() if weight.device.type == "cpu" else 0
    numbers = frames + clip.numel() * weight.dtype.itemsize
    dtype, device = weight.dtype, weight.device
    least = max(
        numbers + least_budget("encode", config, video, dtype, device=device),
        frames + least_budget("decode", config, latents, dtype, device=device),
    )
    if budget < least:
        raise CommandError(
            f"--memory-budget must be at least {show_bytes(least, up=True)} for this clip, got "
            f"{show_bytes(budget)}; or ask for fewer --frames or a smaller --height"
        )
    return (
        plan_encode(config, video, dtype, budget - numbers, device=device),
        plan_decode(config, latents, dtype, budget - frames, device=device),
    )


def round_trip(
    vae: "HunyuanVideoVAE",
    clip: "Tensor",
    stages: "Stages",
    plans: "tuple[Plan, Plan] | None" = None,
) -> "Tensor":
    """Encode and decode frames (T, H, W, 3) uint8 by the posterior's mean; the same shape back.

    plans: how to encode and decode within a budget; None: whole maps, or tiles.
    Raises FloatingPointError when the VAE returns NaN or infinity.
    """
    import torch

    weight = next(vae.parameters())
    with torch.no_grad():
        with stages.stage("encode"):
            video = _to_video(clip, weight)
            if plans is None:
                latents = vae.encode(video).mode()
            else:
                latents = vae.encode(
                    video, plans[0].budget, progress=_reporter(stages, "encode")
                ).mode()
            del video
        with stages.stage("decode"):
            if plans is None:
                video = vae.decode(latents)[0]
            else:
                video = vae.decode(latents, plans[1].budget, progress=_reporter(stages, "decode"))[
                    0
                ]
        return _to_frames(video)


def _reporter(stages: "Stages", name: str) -> Callable[[float], None]:
    """Progress of one stage, in thousandths."""
    return lambda done: stages(name, round(1000 * done), 1000)


def _to_video(clip: "Tensor", weight: "Tensor") -> "Tensor":
    """Frames (T, H, W, 3) uint8 as (1, 3, T, H, W) in [-1, 1], like the weights, channels-last."""
    import torch

    shape = tuple(clip.shape)
    video = torch.empty((1, *shape), dtype=weight.dtype, device=weight.device)
    for numbers, frame in zip(video[0], clip, strict=True):
        numbers.copy_(frame.to(weight.device, torch.float32) / 127.5 - 1)
    return video.movedim(-1, 1)


def _to_frames(video: "Tensor") -> "Tensor":
    """Frames (T, H, W, 3) uint8 on the CPU of a video (3, T, H, W) in [-1, 1].

    Frame by frame: a long clip in floating point is four times as large as in bytes.
    """
    import torch

    frames = torch.empty((*video.shape[1:], len(video)), dtype=torch.uint8)
    for frame, numbers in zip(frames, video.unbind(1), strict=True):
        if not bool(torch.isfinite(numbers).all()):
            raise FloatingPointError(
                f"the VAE returned NaN or infinity in {video.dtype}; use --dtype float32, and if "
                "that does not help check the weights"
            )
        pixels = ((numbers.float() + 1) * 127.5).round().clamp(0, 255)
        frame.copy_(pixels.to(torch.uint8).movedim(0, -1))
    return frames
