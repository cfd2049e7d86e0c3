"""The folder of a whole pipeline: reading all parts, and writing them whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.text import (
    CLIPTextEncoder,
    LLMTextEncoder,
    PromptTemplate,
    installed_template,
)
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.models.weights import CheckpointError, Manifest, PipelineFiles, describe, seal
from hunyuan_fast.models.weights.configs import read_config
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.models.weights.locate import locate
from hunyuan_fast.models.weights.manifest import MANIFEST
from hunyuan_fast.pipelines.inputs import Limits
from hunyuan_fast.pipelines.settings import GenerationDefaults, PipelineSettings, build

if TYPE_CHECKING:
    from hunyuan_fast.pipelines.text_to_video import HunyuanVideoPipeline

PipelineLayout = Literal["native", "diffusers"]
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
SEALED = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEMPLATE_FILE = "prompt_template.json"
RELEASED_SHIFT = 7.0

Parts = tuple[
    HunyuanVideoTransformer, HunyuanVideoVAE, LLMTextEncoder, CLIPTextEncoder, PipelineSettings
]


def load_parts(
    path_or_repo: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    text_weights: bool = True,
) -> Parts:
    """Read every part of the pipeline at a folder, repo id or embedded name.

    text_weights: False leaves those of the text encoders unread, and their digests unchecked.
    That all parts are there is checked before the first weight is read.
    Raises CheckpointError, FileNotFoundError or ValueError naming the file.
    """
    files = describe(path_or_repo)
    place = {part: files.require(part) for part in PARTS}
    settings = read_settings(files)
    if files.layout == "native":
        for part in SEALED if text_weights else TOKENIZERS:
            _check_seal(place[part])
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    other = side_dtype(dtype, device)
    llm = LLMTextEncoder.from_pretrained(
        place["text_encoder"],
        place["tokenizer"],
        settings.prompt_template,
        skip_layer=settings.hidden_state_skip_layer,
        device=device,
        dtype=other,
        weights=text_weights,
    )
    clip = CLIPTextEncoder.from_pretrained(
        place["text_encoder_2"],
        place["tokenizer_2"],
        max_length=settings.clip_max_length,
        device=device,
        dtype=other,
        weights=text_weights,
    )
    vae = HunyuanVideoVAE.from_pretrained(place["vae"], device=device, dtype=other)
    transformer = HunyuanVideoTransformer.from_pretrained(
        place["transformer"], device=device, dtype=dtype
    )
    return transformer, vae, llm, clip, settings


def read_limits(path_or_repo: str | Path) -> Limits:
    """What calls of a stored pipeline may ask for, read from its configurations without weights.

    Raises CheckpointError, FileNotFoundError or ValueError naming the file.
    """
    files = describe(path_or_repo)
    place = {part: files.require(part) for part in PARTS}
    configs = {
        kind.component: read_config(
            locate(place[kind.component], None, kind.component),
            kind.config_class,
            kind.component,
            kind.checkpoint_names(),
        )
        for kind in (HunyuanVideoTransformer, HunyuanVideoVAE)
    }
    return Limits(**configs, defaults=read_settings(files).generation)


def side_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Data type of the VAE and the text encoders beside a transformer in `dtype`.

    The reference runs them in float16 beside a bfloat16 transformer: three more bits of mantissa.
    On a CPU float16 is slow, so they share the transformer's type there.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.float16
    return dtype


def read_settings(files: PipelineFiles) -> PipelineSettings:
    """Settings of a pipeline folder; those of the released model where the layout has none.

    The prompt template then comes from `prompt_template.json` in the folder, or else from the
    installed diffusers, and a shift other than the released one from the folder's scheduler.
    """
    if files.layout == "native":
        _check_seal(files.root)
        return PipelineSettings.load(files.root)
    shift = None
    if files.scheduler is not None:
        shift = read_json(files.scheduler / "scheduler_config.json").get("shift")
    return PipelineSettings(
        prompt_template=_read_template(files.root),
        generation=GenerationDefaults(shift=None if shift == RELEASED_SHIFT else shift),
    )


def _check_seal(folder: Path) -> None:
    """Compare a folder with its digests, where it carries any: one put together by hand may not."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        Manifest(folder).check_files()
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; if you changed the folder on purpose, delete {folder / MANIFEST}"
        ) from error


def _read_template(root: Path) -> PromptTemplate:
    path = root / TEMPLATE_FILE
    if not path.is_file():
        return installed_template()
    try:
        return build(PromptTemplate, read_json(path), "prompt_template")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_parts(pipeline: HunyuanVideoPipeline, path: Path, layout: PipelineLayout) -> None:
    """Write a pipeline into the new folder `path`: beside it first, then renamed into place."""
    if layout not in get_args(PipelineLayout):
        raise ValueError(f'layout must be "native" or "diffusers", got {layout!r}')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"path must be new or an empty folder, got {path}; remove it first")
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        if layout == "native":
            pipeline.settings.save(partial)
            seal(partial)  # the settings only: every part has digests of its own
        pipeline.transformer.save_pretrained(partial / "transformer", layout=layout)
        pipeline.vae.save_pretrained(partial / "vae", layout=layout)
        pipeline.text_encoder.save_pretrained(partial / "text_encoder", partial / "tokenizer")
        pipeline.text_encoder_2.save_pretrained(partial / "text_encoder_2", partial / "tokenizer_2")
        if layout == "native":
            for part in SEALED:
                seal(partial / part)
        else:
            _write_diffusers_index(pipeline, partial)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_diffusers_index(pipeline: HunyuanVideoPipeline, folder: Path) -> None:
    """What diffusers needs beside the weights; the template travels in a file of its own."""
    llm, clip = pipeline.text_encoder, pipeline.text_encoder_2
    index = {
        "_class_name": "HunyuanVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", type(llm.model).__name__],
        "text_encoder_2": ["transformers", type(clip.model).__name__],
        "tokenizer": ["transformers", type(llm.tokenizer).__name__],
        "tokenizer_2": ["transformers", type(clip.tokenizer).__name__],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    }
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": pipeline.settings.generation.shift or RELEASED_SHIFT,
    }
    _write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    template = pipeline.settings.to_dict()["prompt_template"]
    _write_json(folder / TEMPLATE_FILE, template)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
