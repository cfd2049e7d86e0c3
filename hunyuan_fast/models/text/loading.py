"""Strict reading of transformers folders: no download, no pickled code, no missing weight."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hunyuan_fast.models.weights.errors import CheckpointError


def load_model(path: Path, class_name: str, *, dtype: torch.dtype | None = None) -> Any:
    """Load a transformers model of the named class from a folder; dtype None keeps the stored one.

    Raises ImportError without transformers, and CheckpointError naming the folder when a file is
    missing or damaged, or the first weight that the files lack or the model has no place for.
    Other parts in the folder, an image tower or a language model's head, are passed over.
    """
    transformers = _transformers()
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'}: missing; a text encoder is expected there")
    loader = getattr(transformers, class_name)
    try:
        with quiet():
            model, report = loader.from_pretrained(
                path,
                dtype=dtype or "auto",
                local_files_only=True,
                weights_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they come back in the report, with their names
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors share no base class below
        raise CheckpointError(f"{path}: cannot be loaded as a text encoder ({error})") from error
    missing = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are missing or have another "
            f"shape, the first is {missing[0]}; the folder is incomplete or of another model"
        )
    if left_over := _left_over(model, report["unexpected_keys"]):
        raise CheckpointError(
            f"{path}: {len(left_over)} weights have no place in the {type(model).__name__} of "
            f"config.json, the first is {left_over[0]}; config and weights are of different models"
        )
    return model.eval().requires_grad_(False)


def empty_model(path: Path, class_name: str, *, dtype: torch.dtype | None = None) -> Any:
    """The same model without memory, on the meta device: no file of weights is opened.

    Raises as :func:`load_model` does where the configuration is missing or of no such model.
    """
    transformers = _transformers()
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'}: missing; a text encoder is expected there")
    loader = getattr(transformers, class_name)
    own = getattr(loader, "config_class", None)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(), torch.device("meta"):
            if own is None:  # a class that looks for the right one
                config = transformers.AutoConfig.from_pretrained(path, **options)
                model = loader.from_config(config, trust_remote_code=False)
            else:
                model = loader(own.from_pretrained(path, **options))
    except Exception as error:  # transformers has no base class for its errors
        raise CheckpointError(f"{path}: cannot be loaded as a text encoder ({error})") from error
    return model.to(dtype).eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer from a folder.

    Raises ImportError without transformers, and CheckpointError naming the folder when it is
    missing or holds no tokenizer.
    """
    transformers = _transformers()
    if not path.is_dir():
        raise CheckpointError(f"{path}: missing; a tokenizer is expected there")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers share no base class below
        raise CheckpointError(f"{path}: cannot be loaded as a tokenizer ({error})") from error


def _left_over(model: Any, keys: Iterable[str]) -> list[str]:
    """Stored weights that lie in the text model and that its config does not account for."""
    parent = "language_model." if hasattr(model, "language_model") else ""
    text_model = model.language_model if parent else model
    parts = {name for name, _ in text_model.named_children()}
    # tables that older releases stored and newer ones compute
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return sorted(
        key
        for key in keys
        if key.startswith(parent)
        and key.removeprefix(parent).partition(".")[0] in parts
        and key.rpartition(".")[2] not in computed
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and load reports inside the block."""
    logging = _transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the text encoders need transformers ({error}); install it: `pip install transformers`"
        ) from error
    return transformers
