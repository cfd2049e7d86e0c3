"""Attention windows on the command line: their file, and whether they fit what is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from hunyuan_fast.cli.errors import CommandError

if TYPE_CHECKING:
    from hunyuan_fast.models.dit.windows import AttentionWindows
    from hunyuan_fast.pipelines.inputs import Limits, Request


def token_grid(limits: "Limits", request: "Request") -> tuple[int, int, int]:
    """Video tokens along (T, H, W)."""
    sizes, patch = request.latent_shape[2:], limits.transformer.patch_size
    t, h, w = (size // step for size, step in zip(sizes, patch, strict=True))
    return t, h, w


def read_windows(path: Path, model: str, grid: tuple[int, int, int]) -> "AttentionWindows":
    """The windows in a file.

    Raises:
        CheckpointError: the file holds none.
        CommandError: they are for another model or for another size of video.
    """
    from hunyuan_fast.models.dit.windows import AttentionWindows

    windows = AttentionWindows.load(path)
    if not _same(windows.model, model):
        raise CommandError(
            f"{path} was calibrated for the model {windows.model!r}, not for {model!r}; calibrate "
            'this one, or write its name into the field "model" if it is the same'
        )
    if windows.grid != grid:
        raise CommandError(
            f"{path} was calibrated for {_show(windows.grid)} tokens (frames, height, width), and "
            f"this video has {_show(grid)}; ask for the same --height, --width and --frames, or "
            "calibrate this size"
        )
    return windows


def _same(first: str, second: str) -> bool:
    """Whether two names stand for one model: the same words, or one folder."""
    if first == second:
        return True
    return Path(first).exists() and Path(first).resolve() == Path(second).resolve()


def _show(grid: tuple[int, int, int]) -> str:
    return " x ".join(map(str, grid))
