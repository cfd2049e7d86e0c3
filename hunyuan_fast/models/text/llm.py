"""Token states of a decoder-only language model (LLaVA-Llama-3 in the released system)."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.models.text.encoder import TextEncoder
from hunyuan_fast.models.text.loading import empty_model, load_model, load_tokenizer
from hunyuan_fast.models.text.template import PromptTemplate
from hunyuan_fast.models.text.tokens import pad_right, token_ids, warn_truncated
from hunyuan_fast.models.weights.errors import CheckpointError


class LLMTextEncoder(TextEncoder):
    """Hidden states of a prompt's tokens in a chat template, taken some layers before the end.

    model: a transformers LlamaModel, or a model that holds one as `language_model`
    tokenizer: the tokenizer of that model
    skip_layer: number of last layers left out. The released system uses 2: the states after layer
    30 of 32, without the final norm. 0 gives the normed output of the whole model.
    Raises TypeError or ValueError when the tokenizer and the template do not fit together.
    """

    def __init__(
        self, model: Any, tokenizer: Any, template: PromptTemplate, skip_layer: int = 2
    ) -> None:
        decoder = _decoder(model)
        if decoder is None:
            raise TypeError(f"model must be a LlamaModel or hold one, got {type(model).__name__}")
        super().__init__(decoder, tokenizer)
        self.template = template
        self.skip_layer = skip_layer
        num_layers = len(self.model.layers)
        if isinstance(skip_layer, bool) or not isinstance(skip_layer, int):
            raise TypeError(f"skip_layer must be an integer, got {type(skip_layer).__name__}")
        if not 0 <= skip_layer < num_layers:
            raise ValueError(
                f"skip_layer must be from 0 to {num_layers - 1} for this model, got {skip_layer}"
            )
        _check_crop(tokenizer, template)

    @classmethod
    def from_pretrained(
        cls,
        path: Path,
        tokenizer_path: Path,
        template: PromptTemplate,
        *,
        skip_layer: int = 2,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights: bool = True,
    ) -> "LLMTextEncoder":
        """Load the model and the tokenizer from folders in transformers' format.

        weights: False leaves the model without memory, on the meta device.
        Raises CheckpointError naming the folder when something is missing or does not fit.
        """
        decoder = _decoder((load_model if weights else empty_model)(path, "AutoModel", dtype=dtype))
        if decoder is None:
            raise CheckpointError(
                f"{path}: holds no decoder-only language model; expected one like LlamaModel"
            )
        if weights:
            decoder = decoder.to(device)
        return cls(decoder, load_tokenizer(tokenizer_path), template, skip_layer)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], template: PromptTemplate | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts to states (B, L, D) in the model's dtype and mask (B, L) bool.

        L is the template's max_length. The mask is true on a prefix of each row: the prompt's
        tokens and what the template puts behind them. States behind the prefix are zero. A prompt
        too long is cut on the right with a PromptTruncationWarning. Raises ValueError for a prompt
        of which nothing is left after the crop, or a template that does not fit the tokenizer.
        """
        if template is None:
            template = self.template
        else:
            _check_crop(self.tokenizer, template)
        rows = [self._tokens(prompt, template) for prompt in prompts]
        ids, mask = pad_right(rows, pad_id=0, device=self.device)
        hidden = self._trunk()(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state

        # attention is causal, so the positions after the longest prompt need not be run
        states = hidden.new_zeros(len(rows), template.max_length, hidden.shape[-1])
        kept = mask.new_zeros(len(rows), template.max_length)
        length = hidden.shape[1] - template.crop_start
        states[:, :length] = hidden[:, template.crop_start :]
        kept[:, :length] = mask[:, template.crop_start :]
        return states.masked_fill(~kept[..., None], 0), kept

    def _tokens(self, prompt: str, template: PromptTemplate) -> list[int]:
        ids = token_ids(self.tokenizer, template.fill(prompt))
        longest = template.crop_start + template.max_length
        if len(ids) <= template.crop_start:
            raise ValueError(
                f"prompt must give more than the {template.crop_start} tokens that are cut, got "
                f"{len(ids)} for {prompt!r}; use a template that closes the prompt with a token"
            )
        if len(ids) > longest:
            warn_truncated(self.tokenizer, ids[longest:], "language model", template.max_length)
        return ids[:longest]

    def _trunk(self) -> Any:
        """The model without its last skip_layer layers and final norm, sharing all parameters.

        Equal to asking for hidden_states[-1 - skip_layer], minus the work behind it.
        """
        if self.skip_layer == 0:
            return self.model
        depth = len(self.model.layers) - self.skip_layer
        trunk = copy.copy(self.model)
        trunk._modules = {
            **self.model._modules,
            "layers": self.model.layers[:depth],
            "norm": nn.Identity(),
        }
        trunk.config = copy.copy(self.model.config)
        trunk.config.num_hidden_layers = depth
        return trunk


def _decoder(model: Any) -> Any:
    """The decoder that a model is or holds, None when there is none."""
    decoder = getattr(model, "language_model", model)
    has_parts = all(hasattr(decoder, part) for part in ("embed_tokens", "layers", "norm"))
    return decoder if has_parts else None


def _check_crop(tokenizer: Any, template: PromptTemplate) -> None:
    """Refuse a crop that would cut into the prompt; warn of one that leaves some of the template.

    The tokens that two different prompts have in common at the start are those before the prompt.
    """
    first, second = (token_ids(tokenizer, template.fill(prompt)) for prompt in ("", "red"))
    common = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first)
    )
    if template.crop_start > common:
        raise ValueError(
            f"crop_start must be at most {common}, the tokens before the prompt with this "
            f"tokenizer, got {template.crop_start}; template and tokenizer do not belong together"
        )
    if 0 < template.crop_start < common:
        warnings.warn(
            f"crop_start is {template.crop_start}, but with this tokenizer {common} tokens stand "
            "before the prompt and some of the template is kept; is it the right tokenizer?",
            stacklevel=3,
        )
