"""Strict reading of transformers folders: no download, no pickled code, no missing weight."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_model(path: Path, class_name: str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a transformers model of the named class from a folder; dtype None keeps the stored one.

    Raises ImportError without transformers, FileNotFoundError when the folder or its config.json is
    missing, and ValueError naming the folder and the first missing weight when the weights do not
    fill the model.
    """
    transformers = _transformers()
    _require(path, "config.json", "a text encoder")
    loader = getattr(transformers, class_name)
    try:
        model, report = loader.from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            weights_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot load a text encoder from {path}: {error}") from error
    missing = sorted(report["missing_keys"]) + [
        str(key[0]) for key in report.get("mismatched_keys", ())
    ]
    if missing:
        raise ValueError(
            f"text encoder in {path} lacks {len(missing)} weights of {type(model).__name__}, "
            f"the first is {missing[0]}; the folder is incomplete or holds another model"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer from a folder.

    Raises ImportError without transformers, FileNotFoundError when the folder is missing and
    ValueError when it holds no tokenizer.
    """
    transformers = _transformers()
    if not path.is_dir():
        raise FileNotFoundError(f"no tokenizer folder at {path}")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot load a tokenizer from {path}: {error}") from error


def _require(path: Path, name: str, what: str) -> None:
    if not (path / name).is_file():
        raise FileNotFoundError(f"{what} is expected in {path}, but {path / name} is missing")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the text encoders need transformers ({error}); install it with `pip install "
            "'hunyuan-fast[text]'`"
        ) from error
    return transformers
