"""Make a video from a prompt."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from hunyuan_fast.cli.errors import UsageError
from hunyuan_fast.cli.outputs import output_paths, tried
from hunyuan_fast.cli.parallel import (
    ParallelOptions,
    check_attention,
    check_videos,
    console_of_process,
    is_first,
    join,
    named,
    place_of_process,
    rank_of_process,
    read_layout,
)
from hunyuan_fast.cli.parsing import (
    Float,
    Int,
    OptionalFile,
    OptionalFloat,
    OptionalInput,
    OptionalInt,
    OptionalText,
    parse,
)
from hunyuan_fast.cli.placement import in_flags, read_place
from hunyuan_fast.cli.record import record
from hunyuan_fast.cli.windows import read_windows, token_grid

if TYPE_CHECKING:
    from torch import Tensor

    from hunyuan_fast.distributed.mesh import Layout
    from hunyuan_fast.models.dit.windows import AttentionWindows
    from hunyuan_fast.pipelines.inputs import Request

PARALLEL = True
RECORDED_FLAGS = (
    *("model", "height", "width", "frames", "steps", "guidance", "true-cfg"),
    *("shift", "seed", "negative", "dtype", "attention-precision", "fps", "attention-windows"),
)


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast generate`` takes; None stands for the model's own default."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What to show, in quotes."""
    out: OptionalFile = None
    """File to write: .mp4, or .png for one frame. Default: the next free hunyuan-0001.mp4."""
    model: Annotated[str, arg(metavar="nano|FOLDER|REPO")] = "nano"
    """The embedded nano, a model folder, or a Hugging Face repo id."""
    height: OptionalInt = None
    """Pixels, a multiple of 16. Default: the model's."""
    width: OptionalInt = None
    """Pixels, a multiple of 16. Default: the model's."""
    frames: OptionalInt = None
    """Number of frames, of the form 4n + 1; 1 makes an image. Default: the model's."""
    steps: OptionalInt = None
    """Denoising steps. Default: the model's."""
    guidance: OptionalFloat = None
    """Embedded guidance scale of distilled models. Default: the model's."""
    true_cfg: Float = 1.0
    """Classifier-free guidance scale; 1 switches it off, above 1 every step costs twice."""
    negative: OptionalText = None
    """What to keep away from; needs --true-cfg above 1."""
    shift: OptionalFloat = None
    """Shift of the noise levels. Default: the model's, or by the number of steps."""
    seed: Int = 0
    """Seed of the noise; video i uses seed + i."""
    num_videos: Int = 1
    """Number of videos; several become out_0.mp4, out_1.mp4, ..."""
    fps: OptionalFloat = None
    """Frames per second of the file. Default: the model's."""
    attention_windows: OptionalInput = None
    """Windows that calibrate-attention wrote for this model and size: sparse attention."""
    dtype: OptionalText = None
    """float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU."""
    attention_precision: Annotated[str, arg(metavar="same|fp8")] = "same"
    """same as dtype, or fp8: faster on GPUs with such products, and less exact."""
    device: OptionalText = None
    """cpu, cuda or cuda:N. Default: a GPU if there is one."""
    parallel: OmitArgPrefixes[ParallelOptions] = field(default_factory=ParallelOptions)
    overwrite: bool = False
    """Replace files that exist."""
    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Check everything, try the output place, then load, sample, decode and write."""
    options = parse(Options, argv, "generate", __doc__)
    if not options.prompt.strip():
        raise UsageError("PROMPT must not be empty; say what the video should show")
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise UsageError(f"--fps must be above 0 and at most 1000, got {options.fps:g}")

    from hunyuan_fast.cli.stages import Stages, console
    from hunyuan_fast.pipelines import HunyuanVideoPipeline

    _quieten_transformers()
    layout = read_layout(options.parallel, "generate")
    device, dtype = read_place(place_of_process(options.device), options.dtype)
    request, fps, windows = _read(options, layout)
    suffix = ".mp4" if request.num_frames > 1 else ".png"
    paths: tuple[Path, ...] = ()
    place: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if is_first():
        paths = output_paths(options.out, len(request.prompts), suffix, stem="hunyuan")
        # H.264 at this quality stays below 1.5 bytes per pixel, PNG below 3, even for pure noise.
        pixels = len(paths) * request.height * request.width * request.num_frames
        place = tried(paths, overwrite=options.overwrite, size=3 * pixels + 2**20)
    with place, Stages(str(device), console_of_process()) as stages:
        with stages.stage("load"):
            pipe = HunyuanVideoPipeline.from_pretrained(
                options.model,
                device=device,
                dtype=dtype,
                attention_precision=options.attention_precision,
                text_weights=layout.encodes(rank_of_process()),
            )
            pipe.transformer.set_attention(windows=windows)
            join(device)
            pipe.parallelize(layout)
        videos = pipe(**_arguments(options), progress=stages)
        made_with = record(
            dtype=str(pipe.dtype).removeprefix("torch."),
            device=str(device),
            layout=named(layout) or None,
        )
        for index, path in enumerate(paths):
            stages("write", index, len(paths))
            metadata = _metadata(options, request, index, fps) | made_with
            _write(path, videos[index], fps, metadata, overwrite=options.overwrite)
            stages("write", index + 1, len(paths))
    for path in paths:
        print(f"{path}  {_shape(request, fps)}")
    console().print(stages.table())


def _quieten_transformers() -> None:
    """Its progress bars would tear ours apart."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _read(options: Options, layout: "Layout") -> "tuple[Request, float, AttentionWindows | None]":
    """The request with every default filled in, and the windows, before a weight is read."""
    from hunyuan_fast.pipelines.folder import read_limits
    from hunyuan_fast.pipelines.inputs import read_attention_precision, read_request

    limits = read_limits(options.model)
    arguments = _arguments(options) | {"latents": None, "output_type": "uint8", "progress": None}
    try:
        read_attention_precision(options.attention_precision)
        request = read_request(limits, arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(in_flags(str(error))) from error
    check_videos(layout, limits.transformer.heads_num, len(request.prompts))
    windows = None
    if options.attention_windows is not None:
        if options.attention_precision != "same":
            raise UsageError(
                "--attention-windows takes --attention-precision same alone, got "
                f"{options.attention_precision}; leave one of them out"
            )
        check_attention(layout, "--attention-windows")
        grid = token_grid(limits, request)
        windows = read_windows(options.attention_windows, options.model, grid)
    elif options.attention_precision != "same":
        check_attention(layout, f"--attention-precision {options.attention_precision}")
    return request, float(options.fps or limits.defaults.fps), windows


def _arguments(options: Options) -> dict[str, Any]:
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "true_cfg_scale": options.true_cfg,
        "shift": options.shift,
        "seed": options.seed,
        "num_videos": options.num_videos,
    }


def _metadata(options: Options, request: "Request", index: int, fps: float) -> dict[str, Any]:
    """All that makes video ``index`` alone; it depends on its own seed and not on the batch."""
    negative = None if request.negative_prompts is None else request.negative_prompts[index]
    return record(
        command="generate",
        prompt=request.prompts[index],
        model=options.model,
        height=request.height,
        width=request.width,
        frames=request.num_frames,
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
        **{"true-cfg": request.true_cfg_scale},
        shift=request.shift,
        seed=request.seeds[index],
        negative=negative,
        **{"attention-precision": options.attention_precision},
        fps=fps,
        **{"attention-windows": options.attention_windows and str(options.attention_windows)},
    )


def _write(
    path: Path, frames: "Tensor", fps: float, metadata: dict[str, Any], *, overwrite: bool
) -> None:
    from hunyuan_fast.data.video import write_image, write_video

    if path.suffix.lower() == ".png":
        write_image(path, frames[0], metadata, overwrite=overwrite)
    else:
        write_video(path, frames, fps, metadata, overwrite=overwrite)


def _shape(request: "Request", fps: float) -> str:
    size = f"{request.width}x{request.height}"
    if request.num_frames == 1:
        return size
    return f"{size}, {request.num_frames} frames, {fps:g} fps"
