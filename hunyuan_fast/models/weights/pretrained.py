"""`from_pretrained` and `save_pretrained` for every model of the package."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typing_extensions import Self

from hunyuan_fast.models.weights.errors import CheckpointError


class Pretrained:
    """Mixin of a model with `config_class`, `config` and `from_config`.

    The names of the model in other layouts are the functions `rules(config)`,
    `config_to_diffusers(config)` and `config_from_diffusers(dict)` of the module `checkpoint`
    that lies beside the model. `component` is the model's folder in a pipeline.
    """

    config_class: ClassVar[type]
    component: ClassVar[str]
    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model with fresh weights that `config` describes."""
        return cls(**{name: getattr(config, name) for name in config.__dataclass_fields__})

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The model stored at `path_or_repo`, in evaluation mode."""
        folder = Path(path_or_repo) / (subfolder or "")
        try:
            stored = json.loads((folder / "config.json").read_text())["config"]
            state = load_file(folder / "model.safetensors")
        except OSError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        with torch.device("meta"):
            model = cls.from_config(cls.config_class(**fields))
        assert isinstance(model, nn.Module)
        model.load_state_dict(state, strict=True, assign=True)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model into the folder `path`."""
        assert isinstance(self, nn.Module)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        stored = {"format": "hunyuan-fast", "config": asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(stored, indent=2))
