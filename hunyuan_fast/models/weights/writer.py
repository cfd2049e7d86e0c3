"""A model into a folder, in our layout or diffusers', shard by shard."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hunyuan_fast.models.weights.configs import config_json
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.models.weights.folder import atomic_folder
from hunyuan_fast.models.weights.layout import DIFFUSERS_CLASSES, FORMAT, STEM, Layout
from hunyuan_fast.models.weights.manifest import MANIFEST, tensor_digest, write_manifest
from hunyuan_fast.models.weights.rule import Rule
from hunyuan_fast.models.weights.sources import SCALE_SUFFIX
from hunyuan_fast.modules.fp8 import FP8, dequantize_fp8

_FILES = ("config.json", MANIFEST, *(f"{stem}*.safetensors*" for stem in STEM.values()))


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: `rows` of a native parameter under the name of the layout."""

    name: str
    value: Tensor
    scale: Tensor | None = None
    swap_halves: bool = False

    @property
    def nbytes(self) -> int:
        size = 2 if self.scale is not None else self.value.element_size()
        return self.value.numel() * size

    def tensor(self) -> Tensor:
        """The contiguous CPU tensor that owns its memory, as safetensors wants it."""
        value = self.value.detach().cpu()
        if self.scale is not None:
            value = dequantize_fp8(value, self.scale.detach().cpu())
        if self.swap_halves:
            value = torch.cat(value.chunk(2)[::-1])
        value = value.contiguous()
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def save(
    model: nn.Module,
    path: str | Path,
    *,
    config: Any,
    component: str,
    names: ModuleType,
    layout: Layout,
    max_shard_bytes: int,
) -> None:
    """Write weights and config into the folder `path`, which appears whole or not at all.

    fp8 weights keep their form in our layout; diffusers has none, they are expanded there.
    Raises CheckpointError where `path` is taken, OSError where it cannot be written.
    """
    pieces = list(_pieces(model.state_dict(), names.rules(config), layout))
    for piece in pieces:
        if piece.value.is_meta:
            raise ValueError(f"the model has no values to save: {piece.name} is on meta")
    text = config_json(config, component, names, layout)
    with atomic_folder(path, ours=lambda folder: _same_model(folder, component)) as folder:
        (folder / "config.json").write_text(text, encoding="utf-8")
        digests = _write_shards(folder, pieces, STEM[layout], max_shard_bytes)
        if layout == "native":
            write_manifest(folder, digests)


def _pieces(state: dict[str, Tensor], rules: Sequence[Rule], layout: Layout) -> Iterator[Piece]:
    named = {rule.native for rule in rules}
    scales = {name + SCALE_SUFFIX for name, value in state.items() if value.dtype == FP8}
    assert named == set(state) - scales, "the rules do not name every parameter"
    for rule in rules:
        value = state[rule.native]
        scale: Tensor | None = None
        if rule.native + SCALE_SUFFIX in scales:
            scale = state[rule.native + SCALE_SUFFIX]
        if layout == "diffusers":
            for name, view in rule.views(value):
                yield Piece(name, view, scale, rule.swap_halves)
            continue
        yield Piece(rule.native, value)
        if scale is not None:
            yield Piece(rule.native + SCALE_SUFFIX, scale)


def _write_shards(
    folder: Path, pieces: Sequence[Piece], stem: str, max_bytes: int
) -> dict[str, dict[str, int]]:
    """Write the shards and their index; returns the digest of every tensor, by file."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(piece)
        room -= piece.nbytes
    digests: dict[str, dict[str, int]] = {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{stem}{suffix}.safetensors"
        tensors = {piece.name: piece.tensor() for piece in shard}
        digests[file.name] = {name: tensor_digest(value) for name, value in tensors.items()}
        try:
            save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file.name} cannot be written: {error}") from error
    if len(shards) > 1:
        weight_map = {name: file for file, names in digests.items() for name in names}
        total = sum(piece.nbytes for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return digests


def _same_model(folder: Path, component: str) -> bool:
    """Whether a folder holds nothing but an earlier save of the same component."""
    names = [entry.name for entry in folder.iterdir()]
    if not all(any(fnmatch.fnmatch(name, known) for known in _FILES) for name in names):
        return False
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return False
    if config.get("format") == FORMAT:
        return config.get("component") == component
    return config.get("_class_name") == DIFFUSERS_CLASSES.get(component, config)
