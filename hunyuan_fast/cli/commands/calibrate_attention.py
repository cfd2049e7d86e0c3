"""Find out which tiles each attention head must see, on your model and prompts.

The model makes a video of every prompt. At a few denoising steps every head is tried with windows
of several sizes; the table tells what they cost and what they change. The windows chosen, by
--max-error or --budget, are for this size of video: generate takes them with --attention-windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from hunyuan_fast.cli.errors import UsageError
from hunyuan_fast.cli.outputs import output_paths, tried
from hunyuan_fast.cli.parsing import (
    Int,
    OptionalFile,
    OptionalFloat,
    OptionalInt,
    OptionalText,
    parse,
)
from hunyuan_fast.cli.placement import in_flags, read_place
from hunyuan_fast.cli.windows import token_grid

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from hunyuan_fast.cli.stages import Stages
    from hunyuan_fast.models.dit.windows import AttentionWindows
    from hunyuan_fast.pipelines import HunyuanVideoPipeline
    from hunyuan_fast.pipelines.calibration import Measures

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast calibrate-attention`` takes; None stands for the model's own default."""

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT [PROMPT ...]")]
    """What the videos show, each in quotes: like what you will ask for."""
    out: OptionalFile = None
    """File to write (.json). Default: the next free windows-0001.json."""
    model: Annotated[str, arg(metavar="nano|FOLDER|REPO")] = "nano"
    """The embedded nano, a model folder, or a Hugging Face repo id."""
    max_error: OptionalFloat = None
    """Largest relative error of a head's output. Default: 0.1, unless there is a budget."""
    budget: OptionalFloat = None
    """Share of the FLOPs of dense attention to keep, such as 0.5, with the least error."""
    tile: OptionalText = None
    """Tokens of a tile along time, height and width. Default: 6,8,8, less on small grids."""
    windows: OptionalText = None
    """Windows to try, in tiles: '1,3,3 3,3,3'. Default: those of odd length."""
    measured: Int = 3
    """Denoising steps to measure at, spread over all of them."""
    compare: bool = False
    """Make the first video with the windows too, and tell how far it is from the dense one."""
    height: OptionalInt = None
    """Pixels, a multiple of 16. Default: the model's."""
    width: OptionalInt = None
    """Pixels, a multiple of 16. Default: the model's."""
    frames: OptionalInt = None
    """Number of frames, of the form 4n + 1. Default: the model's."""
    steps: OptionalInt = None
    """Denoising steps. Default: the model's."""
    seed: Int = 0
    """Seed of the noise."""
    dtype: OptionalText = None
    """float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU."""
    device: OptionalText = None
    """cpu, cuda or cuda:N. Default: a GPU if there is one."""
    overwrite: bool = False
    """Replace a file that exists."""
    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Measure while the model works, choose, write, tell."""
    options = parse(Options, argv, "calibrate-attention", __doc__)
    _check(options)

    from hunyuan_fast.cli.stages import Stages, console
    from hunyuan_fast.pipelines import HunyuanVideoPipeline
    from hunyuan_fast.pipelines.calibration import choose

    device, dtype = read_place(options.device, options.dtype)
    measures, steps = _plan(options)
    (path,) = output_paths(options.out, 1, ".json", stem="windows")
    with (
        tried((path,), overwrite=options.overwrite, size=2**20),
        Stages(str(device), console(stderr=True)) as stages,
    ):
        with stages.stage("load"):
            pipe = HunyuanVideoPipeline.from_pretrained(options.model, device=device, dtype=dtype)
        dense = _measure(pipe, options, measures, steps, stages)
        limits = {"max_error": options.max_error, "budget": options.budget}
        if options.max_error is None and options.budget is None:
            limits["max_error"] = 0.1
        windows = choose(measures, options.model, **limits)
        windows.save(path)
        difference = _compare(pipe, options, windows, dense, stages) if options.compare else ""
    console().print(_table(measures))
    text = measures.text
    print(f"{path}  {windows.fraction(text):.1%} of the FLOPs of dense attention{difference}")


def _check(options: Options) -> None:
    if not options.prompts or not all(prompt.strip() for prompt in options.prompts):
        raise UsageError("PROMPT must not be empty; say what the videos should show")
    if options.max_error is not None and options.budget is not None:
        raise UsageError("--max-error and --budget exclude each other; give one of them")
    if options.max_error is not None and options.max_error < 0:
        raise UsageError(f"--max-error must be at least 0, got {options.max_error:g}")
    if options.budget is not None and not 0 < options.budget <= 1:
        raise UsageError(f"--budget must be above 0 and at most 1, got {options.budget:g}")
    if options.measured < 1:
        raise UsageError(f"--measured must be at least 1, got {options.measured}")


def _read_sizes(flag: str, word: str) -> Sizes:
    numbers = word.split(",")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UsageError(f"{flag} must be three positive numbers such as 1,3,3, got {word!r}")
    t, h, w = map(int, numbers)
    return t, h, w


def _plan(options: Options) -> "tuple[Measures, tuple[int, ...]]":
    """What to try, and at which denoising steps; before a weight is read."""
    from hunyuan_fast.pipelines import calibration
    from hunyuan_fast.pipelines.folder import read_limits
    from hunyuan_fast.pipelines.inputs import read_request

    limits = read_limits(options.model)
    arguments = _arguments(options, options.prompts[0])
    arguments |= {"true_cfg_scale": 1.0, "negative_prompt": None, "num_videos": 1, "latents": None}
    try:
        request = read_request(limits, {**arguments, "progress": None})
    except (TypeError, ValueError) as error:
        raise UsageError(in_flags(str(error))) from error
    grid = token_grid(limits, request)
    tile = calibration.default_tile(grid)
    if options.tile is not None:
        tile = _read_sizes("--tile", options.tile)
    candidates = calibration.default_candidates(grid, tile)
    if options.windows is not None:
        asked = [_read_sizes("--windows", word) for word in options.windows.split() or [""]]
        candidates = calibration.read_candidates(asked, grid, tile)
    measures = calibration.Measures(grid, tile, candidates)
    _check_budget(options.budget, measures)
    return measures, calibration.spread(options.measured, request.num_inference_steps)


def _check_budget(budget: float | None, measures: "Measures") -> None:
    """Refuse what no choice of windows can keep to, before anything is measured for it."""
    least = min(map(measures.cost, measures.candidates))  # without text, which adds to it
    if budget is not None and budget < least:
        raise UsageError(
            f"--budget must be at least {least:.3f}, which the smallest windows cost, "
            f"got {budget:g}; try smaller --tile or --windows"
        )


def _arguments(options: Options, prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "num_inference_steps": options.steps,
        "guidance_scale": None,
        "shift": None,
        "seed": options.seed,
        "output_type": "latent",
    }


def _measure(
    pipe: "HunyuanVideoPipeline",
    options: Options,
    measures: "Measures",
    steps: tuple[int, ...],
    stages: "Stages",
) -> "Tensor":
    """Fill ``measures``; returns the latents of the first prompt."""
    from hunyuan_fast.pipelines.calibration import measuring

    latents = []
    for prompt in options.prompts:
        with measuring(pipe.transformer, measures, steps):
            latents.append(pipe(**_arguments(options, prompt), progress=stages))
    return latents[0]


def _compare(
    pipe: "HunyuanVideoPipeline",
    options: Options,
    windows: "AttentionWindows",
    dense: "Tensor",
    stages: "Stages",
) -> str:
    """How far the latents of the first prompt move with the windows."""
    import torch

    pipe.transformer.set_attention(windows=windows)
    latents = pipe(**_arguments(options, options.prompts[0]), progress=stages)
    error = float((latents - dense).norm() / dense.norm())
    cosine = float(torch.cosine_similarity(latents.flatten(), dense.flatten(), dim=0))
    return f"; latents differ by {error:.4f} (relative L2), cosine {cosine:.4f}"


def _table(measures: "Measures") -> "Table":
    """A row for each window: its cost, and what it does to the heads."""
    from rich.table import Table

    t, h, w = measures.tile
    table = Table(f"window (tiles of {t} x {h} x {w})", box=None, pad_edge=False)
    for heading in ("FLOPs", "time", "error, mean", "worst", "recall"):
        table.add_column(heading, justify="right")
    for window in measures.candidates:
        mean, worst, recall = measures.summary(window)
        spent = measures.seconds[window] / measures.seconds[measures.full]
        row = (f"{measures.cost(window):.1%}", f"{spent:.1%}", f"{mean:.4f}", f"{worst:.4f}")
        table.add_row(",".join(map(str, window)), *row, f"{recall:.1%}")
    return table
