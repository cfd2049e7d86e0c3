"""The configuration that belongs to stored weights, in every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.models.weights.layout import DIFFUSERS_CLASSES, FORMAT, Layout
from hunyuan_fast.models.weights.locate import Located
from hunyuan_fast.models.weights.sources import Entry

VERSION = 1
# The official VAE's config.json calls this field otherwise.
_OFFICIAL_NAMES = {"time_compression_ratio": "temporal_compression_ratio"}


def config_json(config: Any, component: str, names: ModuleType, layout: Layout) -> str:
    """The text of config.json in the native or the diffusers layout."""
    if layout == "diffusers":
        data = names.config_to_diffusers(config)
        if component in DIFFUSERS_CLASSES:
            data = {"_class_name": DIFFUSERS_CLASSES[component], **data}
    else:
        data = {"format": FORMAT, "version": VERSION, "component": component}
        data["config"] = asdict(config)
    return json.dumps(data, indent=2) + "\n"


def read_config(located: Located, config_class: type, component: str, names: ModuleType) -> Any:
    """The config of the located weights, an instance of `config_class`.

    The official transformer has no config.json: its sizes are read off the tensors.
    Raises CheckpointError for a config that is missing, of another model, or impossible.
    """
    if located.config is None:
        if located.layout == "official" and component == "transformer":
            settings = official_transformer(located.source.entries, located.place)
            return _build(config_class, settings, located.place)
        raise CheckpointError(
            f"{located.folder / 'config.json'}: no such file; put the model's config.json there "
            "or pass config=... to from_pretrained"
        )
    path, data = located.config, read_json(located.config)
    if located.layout == "native":
        return _build(config_class, _native(data, path, component), path)
    _check_class(data, path, component)
    if located.layout == "official":
        if component == "transformer":
            settings = official_transformer(located.source.entries, located.place)
            return _build(config_class, settings, located.place)
        known = {field.name for field in fields(config_class)}
        renamed = {_OFFICIAL_NAMES.get(name, name): value for name, value in data.items()}
        return _build(config_class, {k: v for k, v in renamed.items() if k in known}, path)
    try:
        return names.config_from_diffusers(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}; is it the config.json of this model?") from error


def check_depth(config: Any, located: Located) -> None:
    """Refuse, before anything is built, a config with more layers than the file has tensors."""
    limit = len(located.source.entries)
    for field in fields(config):
        value = getattr(config, field.name)
        counts_layers = field.name.endswith("depth") or "layers" in field.name
        size = len(value) if isinstance(value, tuple) else value if counts_layers else 0
        if size > limit:
            raise CheckpointError(
                f"{located.config or located.place}: {field.name} asks for {size} layers, but the "
                f"weights are {limit} tensors; they do not belong together"
            )


def _native(data: dict[str, Any], path: Path, component: str) -> dict[str, Any]:
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format must be {FORMAT!r}, got {data.get('format')!r}; the file was replaced "
            "or describes another model"
        )
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version must be {VERSION}, got {data.get('version')!r}; "
            "install a newer hunyuan-fast to read it"
        )
    if data.get("component") != component:
        raise CheckpointError(
            f"{path}: this is the model {data.get('component')!r} of a pipeline, "
            f"expected {component!r}; name the other folder"
        )
    if not isinstance(data.get("config"), dict):
        raise CheckpointError(f"{path}: expected an object under the key config")
    return data["config"]


def _check_class(data: dict[str, Any], path: Path, component: str) -> None:
    """Refuse the diffusers config of another component."""
    expected, got = DIFFUSERS_CLASSES.get(component), data.get("_class_name")
    others = {name for part, name in DIFFUSERS_CLASSES.items() if part != component}
    others |= set() if component == "vae" else {"AutoencoderKLCausal3D"}
    if got in others:
        raise CheckpointError(
            f"{path}: describes a {got}, expected {expected}; name the folder of the {component}"
        )


def _build(config_class: type, settings: Mapping[str, Any], path: Path) -> Any:
    known = {field.name for field in fields(config_class)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} is not a setting of {config_class.__name__} "
            f"(known: {', '.join(sorted(known))})"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return config_class(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def official_transformer(entries: Mapping[str, Entry], place: Path) -> dict[str, Any]:
    """Settings of an official transformer, from the shapes of its tensors.

    The split of a head between time, height and width leaves no trace in shapes: it is known for
    the released head of 128 features only.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = entries[name].shape if name in entries else None
        if found is None or len(found) != dims:
            raise CheckpointError(
                f"{place}: {name} with {dims} dimensions is missing (got shape {found}), "
                "so the model's size is unknown; is this the official transformer?"
            )
        return found

    def depth(blocks: str) -> int:
        indices = {name.split(".")[1] for name in entries if name.startswith(f"{blocks}.")}
        return len(indices)

    hidden, channels, *patch = shape("img_in.proj.weight", 5)
    doubles, singles = depth("double_blocks"), depth("single_blocks")
    norm = "double_blocks.0.img_attn_q_norm" if doubles else "single_blocks.0.q_norm"
    (head_dim,) = shape(f"{norm}.weight", 1)
    if head_dim != 128:
        raise CheckpointError(
            f"{place}: {norm}.weight has {head_dim} features; how heads of this size divide "
            "between time, height and width is not stored, pass config=... to from_pretrained"
        )
    if doubles:
        width = shape("double_blocks.0.img_mlp.fc1.weight", 2)[0]
    else:
        width = shape("single_blocks.0.linear1.weight", 2)[0] - 3 * hidden
    return {
        "hidden_size": hidden,
        "heads_num": hidden // head_dim,
        "mlp_width_ratio": width / hidden,
        "mm_double_blocks_depth": doubles,
        "mm_single_blocks_depth": singles,
        "rope_dim_list": (16, 56, 56),
        "patch_size": tuple(patch),
        "in_channels": channels,
        "out_channels": shape("final_layer.linear.weight", 2)[0] // max(1, math.prod(patch)),
        "text_states_dim": shape("txt_in.input_embedder.weight", 2)[1],
        "text_states_dim_2": shape("vector_in.in_layer.weight", 2)[1],
        "guidance_embed": any(name.startswith("guidance_in.") for name in entries),
        "rope_theta": 256.0,
    }
