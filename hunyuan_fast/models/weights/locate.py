"""The files that hold one model, whatever was named: a pipeline, a model's folder, a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.models.weights.hub import USEFUL, inside, resolve
from hunyuan_fast.models.weights.layout import (
    OFFICIAL_WEIGHTS,
    STEM,
    Layout,
    component_layout,
    describe,
    official_files,
    pipeline_layout,
)
from hunyuan_fast.models.weights.manifest import MANIFEST
from hunyuan_fast.models.weights.sources import Source, open_source

_DIFFUSERS_ROOTS = ("transformer_blocks", "single_transformer_blocks", "x_embedder")
_ROOTS = {
    "a transformer in the native or official layout": ("double_blocks", "img_in", "txt_in"),
    "a transformer in the diffusers layout": (*_DIFFUSERS_ROOTS, "context_embedder"),
    "a VAE": ("post_quant_conv", "quant_conv", "decoder", "encoder"),
    "a CLIP text encoder": ("text_model",),
    "a language model": ("model", "language_model", "lm_head", "embed_tokens", "layers"),
}


@dataclass(frozen=True, kw_only=True)
class Located:
    """Files of one model: its layout, weights, and the config.json beside them if there is one."""

    layout: Layout
    source: Source
    place: Path
    config: Path | None
    index: Path | None = None

    @property
    def folder(self) -> Path:
        return self.place if self.place.is_dir() else self.place.parent


def locate(path_or_repo: str | Path, subfolder: str | None, component: str) -> Located:
    """Find and open the weights of `component` (its folder in a pipeline).

    Raises CheckpointError when there are none.
    """
    only = USEFUL if subfolder is None else ["*.json", f"{subfolder}/*"]
    if subfolder in OFFICIAL_WEIGHTS:
        only = [*only, OFFICIAL_WEIGHTS[subfolder]]
    root = resolve(path_or_repo, only=only)
    if root.is_dir() and subfolder in (None, component) and pipeline_layout(root) is not None:
        place = describe(root).require(component)
    else:
        place = root if subfolder is None else inside(root, subfolder)
    return _file(place) if place.is_file() else _folder(place)


def recognise(names: list[str]) -> str | None:
    """Which kind of model has parameters of these names, in words."""
    roots = {name.partition(".")[0] for name in names}
    return next((kind for kind, known in _ROOTS.items() if roots & set(known)), None)


def _file(file: Path) -> Located:
    source = open_source([file])
    config = file.with_name("config.json")
    layout: Layout = "official"
    if (file.parent / MANIFEST).is_file():
        layout = "native"
    elif file.name.startswith(STEM["diffusers"]) or _has_diffusers_names(source):
        layout = "diffusers"
    return Located(
        layout=layout, source=source, place=file, config=config if config.is_file() else None
    )


def _has_diffusers_names(source: Source) -> bool:
    return any(name.partition(".")[0] in _DIFFUSERS_ROOTS for name in source.entries)


def _folder(folder: Path) -> Located:
    layout = component_layout(folder)
    if layout is None:
        present = sorted(entry.name for entry in folder.iterdir())
        raise CheckpointError(
            f"{folder}: the folder is empty; download or save a model into it"
            if not present
            else f"{folder}: no model of a known layout, it holds {present[:8]}; expected "
            f"config.json with {STEM['native']}*.safetensors or {STEM['diffusers']}*.safetensors, "
            "or the official .pt"
        )
    if layout == "official":
        return _file(official_files(folder)[0])
    config = folder / "config.json"
    _refuse_transformers(config)
    index, files = _shards(folder, STEM[layout])
    source = open_source(files)
    if index is not None:
        _check_index(index, source)
    return Located(
        layout=layout,
        source=source,
        place=folder,
        config=config if config.is_file() else None,
        index=index,
    )


def _refuse_transformers(config: Path) -> None:
    architectures = read_json(config).get("architectures") if config.is_file() else None
    if architectures:
        raise CheckpointError(
            f"{config}: describes {architectures} of transformers, a text encoder; "
            "name the folder of the model that is to be loaded"
        )


def _shards(folder: Path, stem: str) -> tuple[Path | None, list[Path]]:
    """The index, if the model is sharded, and the weights files."""
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not index.is_file():
        if single.is_file():
            return None, [single]
        present = sorted(entry.name for entry in folder.iterdir())
        raise CheckpointError(
            f"{index if any(folder.glob(f'{stem}-*-of-*')) else single}: no such file; "
            f"{folder} holds {present[:8]}; download or copy the missing file"
        )
    names = dict.fromkeys(_weight_map(index).values())
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:  # noqa: PTH119 (pathlib normalises)
            raise CheckpointError(f"{index}: shard {name!r} must be a file name in its own folder")
        if not (folder / name).is_file():
            key = next(key for key, file in _weight_map(index).items() if file == name)
            raise CheckpointError(
                f"{folder / name}: no such shard, {index.name} expects {key} in it; "
                "download or copy the missing file"
            )
    return index, [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object weight_map that names the shards")
    return weight_map


def _check_index(index: Path, source: Source) -> None:
    for key, file in _weight_map(index).items():
        entry = source.entries.get(key)
        if entry is None or entry.file.name != file:
            raise CheckpointError(
                f"{index.with_name(file)}: {key} is missing, but {index.name} expects it there; "
                "fetch index and shards again, they belong to different models"
            )
