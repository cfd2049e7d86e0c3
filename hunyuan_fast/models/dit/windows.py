"""Attention windows of a transformer: what every head of every block sees, as a file keeps it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hunyuan_fast.kernels.sliding_tile_attention.windows import fraction, tiles
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.ops.sliding_tile_attention import SlidingTiles

FORMAT_VERSION = 1
Sizes = tuple[int, int, int]
_FIELDS = ("model", "grid", "tile", "blocks")


@dataclass(frozen=True, kw_only=True)
class AttentionWindows:
    """Windows, in tiles along (T, H, W), for every head of every block with joint attention.

    model: the name of the model that they were chosen for
    grid, tile: video tokens, and tokens of a tile, along (T, H, W)
    blocks: by the name of a block ("double_blocks.0"), the window of each head
    Raises TypeError or ValueError naming the field.
    """

    model: str
    grid: Sizes
    tile: Sizes
    blocks: Mapping[str, tuple[Sizes, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise TypeError(f"model must be a name, got {self.model!r}")
        for name in ("grid", "tile"):
            object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        if not isinstance(self.blocks, Mapping) or not self.blocks:
            raise TypeError(f"blocks must map names to windows, got {self.blocks!r}")
        blocks = {}
        for name, heads in self.blocks.items():
            if not isinstance(heads, (list, tuple)) or not heads:
                raise TypeError(f"blocks[{name!r}] must list a window for each head, got {heads!r}")
            blocks[name] = tuple(_sizes(f"blocks[{name!r}]", window) for window in heads)
        object.__setattr__(self, "blocks", blocks)

    def check_blocks(self, names: Sequence[str], num_heads: int) -> None:
        """Raise ValueError unless there is a window for each head of these blocks."""
        if set(names) != set(self.blocks):
            missing = sorted(set(names) ^ set(self.blocks))
            raise ValueError(
                f"windows must be for the {len(names)} blocks of this model, got "
                f"{len(self.blocks)}, {missing[0]!r} is on one side alone; calibrate this model"
            )
        for name, heads in self.blocks.items():
            if len(heads) != num_heads:
                raise ValueError(
                    f"windows of {name!r} must be for {num_heads} heads, got {len(heads)}; "
                    "calibrate this model"
                )

    def patterns(self, device: torch.device) -> dict[str, SlidingTiles]:
        """Who sees whom in every block, with windows on a device."""
        return {
            name: SlidingTiles(
                self.grid, self.tile, torch.tensor(heads, dtype=torch.int32, device=device)
            )
            for name, heads in self.blocks.items()
        }

    def fraction(self, text: int = 0) -> float:
        """What is left of the FLOPs of dense attention, with this many text tokens."""
        heads = [window for block in self.blocks.values() for window in block]
        return sum(fraction(self.grid, self.tile, each, text) for each in heads) / len(heads)

    def rescaled(self, grid: Sizes) -> "AttentionWindows":
        """The same shares of another grid, rounded up to whole tiles of the same size.

        Nothing was measured there: locality usually carries over between sizes of one model.
        """
        grid = _sizes("grid", grid)
        before, after = tiles(self.grid, self.tile), tiles(grid, self.tile)

        def scale(window: Sizes) -> Sizes:
            t, h, w = (
                -(-min(size, old) * new // old)
                for size, old, new in zip(window, before, after, strict=True)
            )
            return t, h, w

        blocks = {name: tuple(map(scale, heads)) for name, heads in self.blocks.items()}
        return replace(self, grid=grid, blocks=blocks)

    def save(self, path: str | Path) -> None:
        """Write the windows as JSON, a line for each block."""
        head = {"format_version": FORMAT_VERSION, "model": self.model}
        head |= {"grid": list(self.grid), "tile": list(self.tile)}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        blocks = [
            f"    {json.dumps(name)}: {json.dumps([list(window) for window in heads])}"
            for name, heads in self.blocks.items()
        ]
        inner = ",\n".join(blocks)
        text = ",\n".join([*lines, f'  "blocks": {{\n{inner}\n  }}'])
        Path(path).write_text(f"{{\n{text}\n}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "AttentionWindows":
        """Read what ``save`` wrote; raises CheckpointError naming the file and what is wrong."""
        values = read_json(Path(path))
        try:
            return cls(**_fields(values))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    version = values.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, got {version!r}; the file holds no "
            "attention windows, or those of another version of hunyuan-fast"
        )
    unknown = sorted(set(values) - {"format_version", *_FIELDS})
    if unknown:
        raise ValueError(f"there is an unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    missing = [name for name in _FIELDS if name not in values]
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing")
    return {name: values[name] for name in _FIELDS}


def _sizes(name: str, values: Any) -> Sizes:
    """Three positive ints."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise TypeError(f"{name} must be three ints along (T, H, W), got {values!r}")
    if any(type(value) is not int for value in values):
        raise TypeError(f"{name} must be three ints along (T, H, W), got {values!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be positive along (T, H, W), got {values!r}")
    t, h, w = values
    return t, h, w
