"""Train a model from nothing: the embedded miniature nano."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_fast.cli.errors import UsageError
from hunyuan_fast.cli.parallel import (
    ParallelOptions,
    check_layout,
    console_of_process,
    is_first,
    join,
    place_of_process,
    read_layout,
)
from hunyuan_fast.cli.parsing import parse

PARALLEL = True
RECIPES = ("nano",)


def run(argv: Sequence[str]) -> None:
    """Choose the recipe by the first word; the options are the recipe's own fields."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: hunyuan-fast train {{{','.join(RECIPES)}}} [OPTIONS]\n\n{__doc__}")
        return
    if words[0] not in RECIPES:
        raise UsageError(f"no recipe {words[0]!r}; expected one of {', '.join(RECIPES)}")
    _nano(words[1:])


def _nano(argv: Sequence[str]) -> None:
    import torch
    from tyro.conf import OmitArgPrefixes

    from hunyuan_fast.cli.stages import Stages
    from hunyuan_fast.trainer.nano import NanoRecipe, train
    from hunyuan_fast.trainer.nano.recipe import TRANSFORMER

    @dataclass(frozen=True)
    class Options:
        """What ``hunyuan-fast train nano`` takes."""

        out: Path = Path("runs/nano")
        """Folder of the checkpoints; the finished pipeline becomes its subfolder model."""
        resume: bool = False
        """Go on from the last checkpoint in the folder."""
        recipe: OmitArgPrefixes[NanoRecipe] = field(default_factory=NanoRecipe)
        parallel: OmitArgPrefixes[ParallelOptions] = field(default_factory=ParallelOptions)
        debug: bool = False
        """Show the traceback of an error."""

    options: Any = parse(Options, argv, "train nano", __doc__)
    layout = read_layout(options.parallel, "train nano")
    check_layout(layout, TRANSFORMER["heads_num"])
    device = torch.device(place_of_process(options.recipe.device) or "cpu")
    join(device)
    with Stages(str(device), console_of_process()) as stages:
        folder = train(
            options.recipe, options.out, resume=options.resume, progress=stages, layout=layout
        )
    if is_first():
        print(folder)
