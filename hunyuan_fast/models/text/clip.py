"""One pooled vector per prompt from a CLIP text model (CLIP-L in the released system)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast.models.text.encoder import TextEncoder
from hunyuan_fast.models.text.loading import empty_model, load_model, load_tokenizer
from hunyuan_fast.models.text.tokens import pad_right, token_ids, warn_truncated

OFFICIAL_MAX_LENGTH = 77


class CLIPTextEncoder(TextEncoder):
    """State of the first end-of-text token after the final layer norm, without the text projection.

    model: a transformers CLIPTextModel
    tokenizer: the tokenizer of that model
    max_length: number of tokens read, the first and the closing one included
    Raises ValueError when max_length exceeds the model's positions or the tokenizer does not close
    a text with its end-of-text token.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = OFFICIAL_MAX_LENGTH) -> None:
        super().__init__(model, tokenizer)
        self.max_length = max_length
        if isinstance(max_length, bool) or not isinstance(max_length, int):
            raise TypeError(f"max_length must be an integer, got {type(max_length).__name__}")
        positions = self.model.config.max_position_embeddings
        if not 3 <= max_length <= positions:
            raise ValueError(
                f"max_length must be between 3 and {positions} for this model, got {max_length}"
            )
        closing = token_ids(tokenizer, "red")[-1]
        if closing != tokenizer.eos_token_id:
            raise ValueError(
                f"tokenizer must close a text with its end-of-text token {tokenizer.eos_token_id}, "
                f"got {closing}; this is not the tokenizer of a CLIP text model"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: Path,
        tokenizer_path: Path,
        *,
        max_length: int = OFFICIAL_MAX_LENGTH,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights: bool = True,
    ) -> "CLIPTextEncoder":
        """Load the model and the tokenizer from folders in transformers' format.

        weights: False leaves the model without memory, on the meta device.
        Raises CheckpointError naming the folder when something is missing or does not fit.
        """
        if weights:
            model = load_model(path, "CLIPTextModel", dtype=dtype).to(device)
        else:
            model = empty_model(path, "CLIPTextModel", dtype=dtype)
        return cls(model, load_tokenizer(tokenizer_path), max_length)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to pooled vectors (B, P) in the model's dtype.

        A prompt too long is cut on the right, its end-of-text token kept, with a
        PromptTruncationWarning.
        """
        rows = [self._tokens(prompt) for prompt in prompts]
        # Attention is causal and the first end-of-text token is pooled: padding changes nothing.
        ids, _ = pad_right(rows, self.tokenizer.eos_token_id, self.device)
        return self.model(input_ids=ids).pooler_output

    def _tokens(self, prompt: str) -> list[int]:
        ids = token_ids(self.tokenizer, prompt.strip())
        if len(ids) > self.max_length:
            warn_truncated(
                self.tokenizer, ids[self.max_length - 1 : -1], "CLIP text model", self.max_length
            )
            ids = [*ids[: self.max_length - 1], ids[-1]]
        return ids
