"""What a pipeline folder says about itself: `hunyuan_fast.json`.

Generation defaults, the prompt template and the lengths of the text encoders. Every field is
checked on reading, and a field that is unknown or missing is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hunyuan_fast.models.text import PromptTemplate
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.files import read_json
from hunyuan_fast.pipelines.readers import Integer, Number, Optional, Reader

FILE_NAME = "hunyuan_fast.json"
FORMAT_VERSION = 1

MAX_SIDE = 16384
MAX_FRAMES = 4097
MAX_STEPS = 1000
# 1000 times the scale must stay finite in float16, whose largest number is 65504.
MAX_GUIDANCE = 60.0

STEPS = Integer(1, MAX_STEPS)
GUIDANCE = Number(0, MAX_GUIDANCE, advice="the released model was distilled for 1 to 8 and uses 6")
SHIFT = Optional(Number(0, 1000, above=True, advice="leave it out for 7 at 50 steps, 17 below 20"))

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Values that stand for None in a call; the defaults are those of the released model.

    height, width: pixels; fps: frames per second; shift None: chosen by the number of steps
    Raises TypeError or ValueError naming the field.
    """

    height: int = 720
    width: int = 1280
    num_frames: int = 129
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    shift: float | None = None
    fps: int = 24

    def __post_init__(self) -> None:
        readers: dict[str, Reader] = {
            "height": Integer(1, MAX_SIDE),
            "width": Integer(1, MAX_SIDE),
            "num_frames": Integer(1, MAX_FRAMES),
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "shift": SHIFT,
            "fps": Integer(1, 240),
        }
        for name, reader in readers.items():
            reader(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Contents of `hunyuan_fast.json`.

    prompt_template: around the prompt for the language model
    image_prompt_template: used in its place for a single frame, when there is one
    hidden_state_skip_layer: number of last layers of the language model left out
    clip_max_length: number of tokens the CLIP text model reads
    Raises TypeError or ValueError naming the field.
    """

    prompt_template: PromptTemplate
    image_prompt_template: PromptTemplate | None = None
    hidden_state_skip_layer: int = 2
    clip_max_length: int = 77
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        _check_type("prompt_template", self.prompt_template, PromptTemplate)
        if self.image_prompt_template is not None:
            _check_type("image_prompt_template", self.image_prompt_template, PromptTemplate)
        _check_type("generation", self.generation, GenerationDefaults)
        Integer(0, 1000)("hidden_state_skip_layer", self.hidden_state_skip_layer)
        Integer(3, 100_000)("clip_max_length", self.clip_max_length)

    def template_for(self, num_frames: int) -> PromptTemplate:
        """Return the template for a clip, or that for images, if any, when num_frames is 1."""
        if num_frames == 1 and self.image_prompt_template is not None:
            return self.image_prompt_template
        return self.prompt_template

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, the format version first."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PipelineSettings":
        """Build settings from plain values; raises TypeError or ValueError naming the field."""
        _check_type("settings", values, Mapping)
        values = dict(values)
        version = values.pop("format_version", None)
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise ValueError(
                f"format_version must be {FORMAT_VERSION}, got {version!r}; "
                "the folder was written by another version of hunyuan-fast"
            )
        for name, kind in (
            ("prompt_template", PromptTemplate),
            ("image_prompt_template", PromptTemplate),
            ("generation", GenerationDefaults),
        ):
            if values.get(name) is not None:
                values[name] = build(kind, values[name], name)
        return build(cls, values, "settings")

    def save(self, folder: Path) -> None:
        """Write `hunyuan_fast.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PipelineSettings":
        """Read `hunyuan_fast.json` from a folder.

        Raises CheckpointError naming the file, and the field that is wrong.
        """
        path = folder / FILE_NAME
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error


def build(kind: type[T], values: Any, where: str) -> T:
    """Build a dataclass from a mapping with no unknown field and every field without default."""
    _check_type(where, values, Mapping)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; known: {', '.join(known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where} lacks the field {name!r}")
    return kind(**values)


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
