"""Tokenising: padding and cuts on the right, and a warning that shows what was cut."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHOWN_CHARACTERS = 200


class PromptTruncationWarning(UserWarning):
    """A prompt was longer than its encoder reads; the message shows the text that was cut."""


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with the tokenizer's special tokens, neither padded nor cut."""
    ids = tokenizer(
        text, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [int(token) for token in ids]


def warn_truncated(tokenizer: Any, cut: Sequence[int], encoder: str, kept: int) -> None:
    """Warn that the named encoder, which keeps `kept` tokens, does not read the tokens `cut`."""
    text = tokenizer.decode(list(cut), skip_special_tokens=True)
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + " ..."
    warnings.warn(
        f"prompt too long for the {encoder}: it reads {kept} tokens and ignores the last "
        f"{len(cut)}: {text!r}",
        PromptTruncationWarning,
        stacklevel=2,
    )


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows padded to the longest: ids (B, L) int64 and mask (B, L) bool, true on tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor(
        [[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device
    )
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]
