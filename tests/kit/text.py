"""Tiny text encoders with random weights: real transformers classes, byte-level tokenizers."""

from __future__ import annotations

from typing import Any

import torch

from hunyuan_fast.models.text import PromptTemplate

BEGIN, HEADER, END, PAD = "<|begin|>", "<|header|>", "<|end|>", "<|pad|>"
TEMPLATE = PromptTemplate(
    template=f"{HEADER}say what the clip shows:{END}{HEADER}\n{{}}{END}",
    crop_start=29,
    max_length=32,
)


def byte_tokenizer(*, closes: bool) -> Any:
    """Tokenizer with a token per byte: a beginning always, an end of text with `closes`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, BEGIN, HEADER, PAD, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, HEADER, PAD, END])
    special = [(token, vocabulary[token]) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if closes else f"{BEGIN} $A", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END if closes else PAD,
        padding_side="right",
    )


def tiny_llama(tokenizer: Any, seed: int = 0, dim: int = 32, layers: int = 4) -> Any:
    """Random LlamaModel of `layers` layers with grouped keys and values."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config).eval()


def tiny_clip(tokenizer: Any, seed: int = 1, dim: int = 24, positions: int = 77) -> Any:
    """Random CLIPTextModel of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()
