"""What both text encoders share: a transformers model beside its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from hunyuan_fast.models.text.loading import quiet


class TextEncoder:
    """A transformers model in evaluation mode and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    def save_pretrained(self, path: Path, tokenizer_path: Path) -> None:
        """Write the model and the tokenizer as folders in transformers' format."""
        with quiet():
            self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(tokenizer_path)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the output."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the output."""
        return next(self.model.parameters()).device

    @property
    def dim(self) -> int:
        """Width of the output."""
        return int(self.model.config.hidden_size)

    def to(self, device: torch.device | str) -> Self:
        """Move the model, unless it has no weights; returns the encoder itself."""
        if self.has_weights:
            self.model.to(device)
        return self

    @property
    def has_weights(self) -> bool:
        """Whether it can encode: on the meta device it only tells its sizes."""
        return self.device.type != "meta"
