"""Which layout a folder or file has, and where the parts of a pipeline lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.models.weights.hub import resolve
from hunyuan_fast.models.weights.manifest import MANIFEST

Layout = Literal["native", "diffusers", "official"]
FORMAT = "hunyuan-fast"
SETTINGS = "hunyuan_fast.json"
OFFICIAL_ROOT = "hunyuan-video-t2v-720p"
OFFICIAL_WEIGHTS = {
    "transformer": f"{OFFICIAL_ROOT}/transformers/mp_rank_00_model_states.pt",
    "vae": f"{OFFICIAL_ROOT}/vae/pytorch_model.pt",
}
TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
DIFFUSERS_CLASSES = {
    "transformer": "HunyuanVideoTransformer3DModel",
    "vae": "AutoencoderKLHunyuanVideo",
}
STEM: dict[Layout, str] = {"native": "model", "diffusers": "diffusion_pytorch_model"}


@dataclass(frozen=True, kw_only=True)
class PipelineFiles:
    """Where the parts of a pipeline lie.

    transformer, vae: a component folder, or a weights file in the official layout; both suit
    `from_pretrained`. text_encoder, tokenizer, text_encoder_2, tokenizer_2: folders for
    transformers. settings: our `hunyuan_fast.json` or diffusers' `model_index.json`.
    A part that is absent is None.
    """

    root: Path
    layout: Layout
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    text_encoder_2: Path | None = None
    tokenizer_2: Path | None = None
    scheduler: Path | None = None
    settings: Path | None = None

    def require(self, part: str) -> Path:
        """The path of `part`; raises CheckpointError when the pipeline has none."""
        path: Path | None = getattr(self, part)
        if path is None:
            raise CheckpointError(
                f"{self.root}: the {self.layout} pipeline has no {part} (expected "
                f"{self.root / expected_place(part, self.layout)}); download or copy it there"
            )
        return path


def expected_place(part: str, layout: Layout) -> str:
    """Where `part` lies in a pipeline folder of this layout, relative to it."""
    if layout == "official":
        return OFFICIAL_WEIGHTS.get(part, part.replace("tokenizer", "text_encoder"))
    return part


def describe(path_or_repo: str | Path) -> PipelineFiles:
    """The parts of the pipeline in a folder, a repo, or the embedded "nano".

    Raises CheckpointError when the folder holds no pipeline of a known layout.
    """
    root = resolve(path_or_repo)
    layout = pipeline_layout(root)
    if layout is None:
        raise CheckpointError(_not_a_pipeline(root))
    parts = {part: _part(root, part, layout) for part in ("transformer", "vae", *TEXT_FOLDERS)}
    settings = {"native": SETTINGS, "diffusers": "model_index.json"}.get(layout)
    return PipelineFiles(
        root=root,
        layout=layout,
        scheduler=_part(root, "scheduler", layout),
        settings=root / settings if settings else None,
        **parts,
    )


def pipeline_layout(root: Path) -> Layout | None:
    """The layout of a pipeline folder, None when it is not one."""
    if (root / SETTINGS).is_file():
        return "native"
    if (root / "model_index.json").is_file():
        return "diffusers"
    if any(_official_weights(root, part) for part in OFFICIAL_WEIGHTS):
        return "official"
    return None


def component_layout(folder: Path) -> Layout | None:
    """The layout of one model's folder, None when it is not one."""
    config = folder / "config.json"
    if (folder / MANIFEST).is_file():
        return "native"
    if config.is_file() and read_json(config).get("format") == FORMAT:
        return "native"
    if any(folder.glob(f"{STEM['diffusers']}*.safetensors*")):
        return "diffusers"
    if official_files(folder):
        return "official"
    return "diffusers" if config.is_file() else None


def official_files(folder: Path) -> list[Path]:
    """The official weights in a folder; the fp8 ones come last."""
    names = [Path(place).name for place in OFFICIAL_WEIGHTS.values()]
    names += [name.replace(".pt", "_fp8.pt") for name in names]
    return [folder / name for name in names if (folder / name).is_file()]


def _part(root: Path, part: str, layout: Layout) -> Path | None:
    if layout == "official" and part in OFFICIAL_WEIGHTS:
        return _official_weights(root, part)
    path = root / expected_place(part, layout)
    return path if path.is_dir() else None


def _official_weights(root: Path, part: str) -> Path | None:
    """The official weights of `part` in a pipeline folder."""
    place = Path(OFFICIAL_WEIGHTS[part])
    files = official_files((root / place).parent)
    return next((file for file in files if file.name.startswith(place.stem)), None)


def _not_a_pipeline(root: Path) -> str:
    if root.is_file():
        return f"{root}: a pipeline is a folder, got a file; name the folder that holds it"
    present = sorted(entry.name for entry in root.iterdir())
    if not present:
        return f"{root}: the folder is empty; download or convert a model into it"
    advice = "name the folder that holds the whole pipeline"
    if {"transformer", "vae"} <= set(present):
        advice = (
            f"a pipeline without its {SETTINGS} or model_index.json; copy the whole folder again"
        )
    elif component_layout(root) is not None:
        advice = f"this is one model of a pipeline; name the folder above it, {root.parent}"
    elif (root / "transformers").is_dir() and root.name == OFFICIAL_ROOT:
        advice = f"name the folder above it, {root.parent}"
    return (
        f"{root}: no pipeline of a known layout (no {SETTINGS}, no model_index.json, no "
        f"{OFFICIAL_ROOT}/); it holds {present[:8]}; {advice}"
    )
