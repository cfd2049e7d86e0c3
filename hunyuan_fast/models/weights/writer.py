"""A model into a folder, in our layout or diffusers', shard by shard."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.models.weights.configs import config_json
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.models.weights.folder import atomic_folder
from hunyuan_fast.models.weights.layout import DIFFUSERS_CLASSES, FORMAT, STEM, Layout
from hunyuan_fast.models.weights.manifest import MANIFEST, tensor_digest, write_manifest
from hunyuan_fast.models.weights.rule import Rule
from hunyuan_fast.models.weights.sources import SCALE_SUFFIX
from hunyuan_fast.models.weights.streamed import Form, TensorsFile
from hunyuan_fast.modules.fp8 import FP8, dequantize_fp8

Take = Callable[[str], Tensor]

_FILES = ("config.json", MANIFEST, *(f"{stem}*.safetensors*" for stem in STEM.values()))


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: `rows` of a native parameter under the name of the layout."""

    name: str
    value: Tensor
    scale: Tensor | None = None
    swap_halves: bool = False

    @property
    def form(self) -> Form:
        """Dtype and shape in the file."""
        dtype = self.value.dtype if self.scale is None else torch.bfloat16
        return dtype, tuple(self.value.shape)

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.form[0].itemsize

    def tensor(self) -> Tensor:
        """The contiguous CPU tensor."""
        value = self.value.detach().cpu()
        if self.scale is not None:
            value = dequantize_fp8(value, self.scale.detach().cpu())
        if self.swap_halves:
            value = torch.cat(value.chunk(2)[::-1])
        return value.contiguous()


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
    state = model.state_dict()
    for name in taken_in_order(state, names.rules(config)):
        if state[name].is_meta:
            raise ValueError(f"the model has no values to save: {name} is on meta")
    save_one_by_one(
        state,
        state.__getitem__,
        path,
        config=config,
        component=component,
        names=names,
        layout=layout,
        max_shard_bytes=max_shard_bytes,
    )


def save_one_by_one(
    forms: Mapping[str, Tensor],
    take: Take,
    path: str | Path,
    *,
    config: Any,
    component: str,
    names: ModuleType,
    layout: Layout,
    max_shard_bytes: int,
) -> None:
    """:func:`save` of tensors that come one after the other and are not kept.

    forms: tensors of the shapes and dtypes of all of them, whose values are not looked at
    take: called once with each name, in the order of :func:`taken_in_order`
    """
    rules = names.rules(config)
    text = config_json(config, component, names, layout)
    with atomic_folder(path, ours=lambda folder: _same_model(folder, component)) as folder:
        (folder / "config.json").write_text(text, encoding="utf-8")
        shards = _shards(_pieces(forms, forms.__getitem__, rules, layout), max_shard_bytes)
        values = _pieces(forms, take, rules, layout)
        digests = _write_shards(folder, shards, values, STEM[layout])
        if layout == "native":
            write_manifest(folder, digests)


def taken_in_order(forms: Mapping[str, Tensor], rules: Sequence[Rule]) -> list[str]:
    """All names of a model's state, in the order in which they are written."""
    scales = _scales(forms)
    pairs = ((rule.native, rule.native + SCALE_SUFFIX) for rule in rules)
    return [name for pair in pairs for name in pair if name == pair[0] or name in scales]


def _scales(forms: Mapping[str, Tensor]) -> set[str]:
    return {name + SCALE_SUFFIX for name, form in forms.items() if form.dtype == FP8}


def _pieces(
    forms: Mapping[str, Tensor], take: Take, rules: Sequence[Rule], layout: Layout
) -> Iterator[Piece]:
    """All pieces; between two of them nothing of what was taken is kept here."""
    scales = _scales(forms)
    assert {rule.native for rule in rules} == set(forms) - scales, (
        "the rules do not name every parameter"
    )
    for rule in rules:
        scale = rule.native + SCALE_SUFFIX
        yield from _of_rule(
            rule, take(rule.native), take(scale) if scale in scales else None, layout
        )


def _of_rule(rule: Rule, value: Tensor, scale: Tensor | None, layout: Layout) -> Iterator[Piece]:
    if layout == "diffusers":
        for name, view in rule.views(value):
            yield Piece(name, view, scale, rule.swap_halves)
        return
    yield Piece(rule.native, value)
    if scale is not None:
        yield Piece(rule.native + SCALE_SUFFIX, scale)


def _shards(pieces: Iterator[Piece], max_bytes: int) -> list[dict[str, Form]]:
    """What each file holds."""
    shards: list[dict[str, Form]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][piece.name] = piece.form
        room -= piece.nbytes
    return shards


def _write_shards(
    folder: Path, shards: Sequence[Mapping[str, Form]], pieces: Iterator[Piece], stem: str
) -> dict[str, dict[str, int]]:
    """Write the shards and their index; returns the digest of every tensor, by file."""
    digests: dict[str, dict[str, int]] = {}
    total = 0
    for number, forms in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{stem}{suffix}.safetensors"
        found = digests[file.name] = {}
        with TensorsFile(file, forms) as stored:
            for name in forms:
                value = _next(pieces, name)
                stored.write(name, value)
                found[name] = tensor_digest(value)
                total += value.nbytes
                del value  # before the next one is there
    if len(shards) > 1:
        weight_map = {name: file for file, names in digests.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return digests


def _next(pieces: Iterator[Piece], name: str) -> Tensor:
    piece = next(pieces)
    assert piece.name == name, "pieces come in the order in which they were planned"
    return piece.tensor()


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
