"""Predict which layout over which GPUs is fastest and fits, before any of them is there.

For a model, a size of video and so many GPUs, all ways to share the work are tried: data, context
(ring x Ulysses) and tensor parallelism, sharded states, recomputation, offloading. The table shows
what a step takes and what bounds it. All figures are predictions from FLOPs, bytes and link speeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from hunyuan_fast.cli.errors import CommandError, UsageError
from hunyuan_fast.cli.outputs import output_paths, tried
from hunyuan_fast.cli.parsing import (
    Int,
    OptionalFile,
    OptionalInput,
    OptionalInt,
    OptionalText,
    parse,
)
from hunyuan_fast.cli.placement import read_place

if TYPE_CHECKING:
    from hunyuan_fast.planning.hardware import Hardware
    from hunyuan_fast.planning.work import Job

_RELEASED = (720, 1280, 129)


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast plan`` takes."""

    model: Annotated[str, arg(metavar="13b|nano|FOLDER")] = "13b"
    """The released 13B model by its sizes alone, the embedded nano, or a model folder."""
    height: OptionalInt = None
    """Pixels. Default: 720, or the model's."""
    width: OptionalInt = None
    """Pixels. Default: 1280, or the model's."""
    frames: OptionalInt = None
    """Number of frames, 4n + 1. Default: 129, or the model's."""
    gpu: OptionalText = None
    """a100-40, a100-80, h100, h200, h20, b200, l40s or 4090. Default: h100."""
    hardware: OptionalInput = None
    """A TOML or JSON file that describes the GPU and its links instead."""
    gpus: Int = 8
    """How many, from 1 to 4096."""
    train: bool = False
    """Plan training steps instead of denoising."""
    videos: OptionalInt = None
    """Videos made at the same time. Default: 1; in training samples of a step: one for each GPU."""
    steps: Int = 50
    """Denoising steps of a video."""
    text_tokens: Int = 256
    """Valid tokens of the prompt."""
    top: Int = 3
    """How many layouts to show."""
    out: OptionalFile = None
    """A PNG to draw the scaling curve into, from 1 to --gpus GPUs; needs matplotlib."""
    check: bool = False
    """Predict the published latencies on 1, 2, 4 and 8 GPUs instead, and tell the errors."""
    measure: OptionalInput = None
    """A .toml or .json to write what the device at hand reaches; plans are checked on it."""
    dtype: OptionalText = None
    """Of what is measured. Default: float32 on a CPU, bfloat16 on a GPU."""
    device: OptionalText = None
    """To measure: cpu, cuda or cuda:N. Default: a GPU if there is one."""
    overwrite: bool = False
    """Replace a file that exists."""
    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Read the question, search, print, draw."""
    options = parse(Options, argv, "plan", __doc__)
    from hunyuan_fast.cli import plans
    from hunyuan_fast.planning.search import search

    if options.check:
        from hunyuan_fast.planning.published import check_official, fitted_attention_tflops

        print(plans.official(check_official(), fitted_attention_tflops()))
        return
    if options.measure is not None:
        _measure(options, options.measure)
        return
    _check(options)
    hardware = _hardware(options)
    job = _job(options)
    if options.out is None:
        print(plans.plan(search(job, hardware, options.gpus, top=options.top)))
        return
    from hunyuan_fast.cli.plan_curves import draw, require_matplotlib

    require_matplotlib()
    (path,) = output_paths(options.out, 1, ".png", stem="plan")
    with tried((path,), overwrite=options.overwrite, size=2**20):
        print(plans.plan(search(job, hardware, options.gpus, top=options.top)), flush=True)
        draw(job, hardware, options.gpus, path)
    print(f"\n{path}")


def _measure(options: Options, path: Path) -> None:
    import torch

    from hunyuan_fast.cli import plans
    from hunyuan_fast.cli.stages import Stages, console
    from hunyuan_fast.pipelines.probe import compare, probe
    from hunyuan_fast.planning.hardware import hardware_text

    device, dtype = read_place(options.device, options.dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    suffix = ".json" if path.suffix == ".json" else ".toml"
    (path,) = output_paths(path, 1, suffix, stem="hardware")
    with (
        tried((path,), overwrite=options.overwrite, size=2**16),
        Stages(str(device), console(stderr=True)) as stages,
    ):
        hardware = probe(device, dtype, stages)
        path.write_text(hardware_text(hardware, suffix), encoding="utf-8")
        rows = compare(hardware, device, dtype, stages)
    print(f"{path}\n{hardware_text(hardware)}\n{plans.comparison(rows)}")


def _check(options: Options) -> None:
    from hunyuan_fast.planning.layouts import MOST_GPUS

    if not 1 <= options.gpus <= MOST_GPUS:
        raise UsageError(f"--gpus must be from 1 to {MOST_GPUS}, got {options.gpus}")
    if options.gpu is not None and options.hardware is not None:
        raise UsageError("--gpu and --hardware exclude each other; give one of them")
    for name in ("height", "width", "frames", "videos", "steps", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if not 0 <= options.text_tokens <= 4096:
        raise UsageError(f"--text-tokens must be from 0 to 4096, got {options.text_tokens}")


def _hardware(options: Options) -> "Hardware":
    from hunyuan_fast.planning.hardware import find_gpu, read_hardware

    if options.hardware is None:
        try:
            return find_gpu(options.gpu or "h100")
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    try:
        return read_hardware(options.hardware)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error


def _job(options: Options) -> "Job":
    from dataclasses import replace

    job = _model(options.model, (options.height, options.width, options.frames))
    videos = options.videos
    if videos is None:
        videos = options.gpus if options.train else 1
    try:
        return replace(
            job,
            text_tokens=options.text_tokens,
            videos=videos,
            training=options.train,
            steps=options.steps,
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _model(name: str, size: tuple[int | None, int | None, int | None]) -> "Job":
    """The job of one video, with the model's own size where none is given."""
    from hunyuan_fast.planning.work import Job, released

    def or_else(default: tuple[int, int, int]) -> list[int]:
        return [own if given is None else given for given, own in zip(size, default, strict=True)]

    try:
        if name == "13b":
            return released(*or_else(_RELEASED))
        from hunyuan_fast.pipelines.folder import read_limits

        limits = read_limits(name)
        own = limits.defaults
        height, width, frames = or_else((own.height, own.width, own.num_frames))
        return Job(
            model=name,
            config=limits.transformer,
            vae=limits.vae,
            height=height,
            width=width,
            frames=frames,
            text_parameters=_text_bytes(name) // 2,
        )
    except ValueError as error:
        if str(error).startswith(("height", "width", "frames")):
            raise UsageError(f"--{error}") from error
        raise


def _text_bytes(name: str) -> int:
    """Bytes of the stored text models."""
    from hunyuan_fast.models.weights import describe

    files = describe(name)
    folders = [files.require(part) for part in ("text_encoder", "text_encoder_2")]
    stored = [path for folder in folders for path in Path(folder).glob("*.safetensors")]
    return sum(path.stat().st_size for path in stored)
