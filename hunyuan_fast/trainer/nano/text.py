"""Stages "llm" and "clip": a word tokenizer, a small Llama and a small CLIP text model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hunyuan_fast.data.shapes.batches import caption
from hunyuan_fast.data.shapes.caption import vocabulary
from hunyuan_fast.distributed.collectives import rank_in
from hunyuan_fast.distributed.shards import part
from hunyuan_fast.models.text.tokens import pad_right, token_ids
from hunyuan_fast.ops.collectives import gather
from hunyuan_fast.trainer.loop import hash_seed, step_generator
from hunyuan_fast.trainer.nano.latents import LatentSet
from hunyuan_fast.trainer.objectives import contrastive_loss, next_token_loss
from hunyuan_fast.trainer.share import ALONE, Share

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOT]"


def build_tokenizer() -> Any:
    """A lower-casing word tokenizer of the caption grammar; [BOS] and [EOT] frame every text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = (PAD, UNKNOWN, BEGIN, END, *vocabulary())
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(BEGIN, words.index(BEGIN)), (END, words.index(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        padding_side="right",
    )


def build_llm(tokenizer: Any, *, width: int, depth: int, heads: int) -> Any:
    """A LlamaForCausalLM for this tokenizer; its ``model`` part is the text encoder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )


def build_clip_text(tokenizer: Any, *, width: int, depth: int, heads: int) -> Any:
    """A CLIPTextModel for this tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=77,
            projection_dim=width,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _tokens(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    rows = [token_ids(tokenizer, text) for text in captions]
    return pad_right(rows, tokenizer.pad_token_id, torch.device("cpu"))


class LanguageStage:
    """Trains the language model to continue captions."""

    name = "llm"

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, seed: int, batch: int, share: Share = ALONE
    ) -> None:
        self.module = model
        self.share = share
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch = batch

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        seed = hash_seed(self.seed, self.name, step)
        ids, mask = _tokens(self.tokenizer, [caption(seed, item) for item in range(self.batch)])
        device = next(self.module.parameters()).device
        tokens = mask[:, 1:].sum(1)
        rows, sizes = self.share.rows(self.batch), self.share.sizes(self.batch)
        ids, mask = ids[rows].to(device), mask[rows].to(device)
        logits = self.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # the mean is over tokens, of which some processes have more than others
        own = tokens[part(sizes, self.share.index)].sum().item()
        weight = own * self.share.count / tokens.sum().item()
        return next_token_loss(logits, ids, mask) * weight, {}


class ContrastiveModel(nn.Module):
    """The CLIP text model and, for training only, a convolutional tower that sees latents."""

    def __init__(self, text: Any, example: Tensor, group: ProcessGroup | None = None) -> None:
        """example: latents (C, T, H, W) of the size to come    group: shares each batch"""
        super().__init__()
        width: int = text.config.hidden_size
        channels, frames, rows, columns = example.shape
        cells = ((frames + 1) // 2) * ((rows + 3) // 4) * ((columns + 3) // 4)
        self.text = text
        self.group = group
        self.video = nn.Sequential(
            nn.Conv3d(channels, 32, 3, stride=(1, 2, 2), padding=1),
            nn.SiLU(),
            nn.Conv3d(32, 64, 3, stride=(2, 2, 2), padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * cells, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        self.log_temperature = nn.Parameter(torch.tensor(0.1).log())

    def forward(self, ids: Tensor, latents: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The matching loss of captions ids (B, L) and latents (B, C, T, H, W) of all processes.

        sizes: samples of each, of which every process finds the same loss
        """
        own = sizes[rank_in(self.group)]
        parts = self.text(input_ids=ids).pooler_output, self.video(latents)
        pooled, seen = (gather(x[:own], sizes, self.group, dim=0) for x in parts)
        return contrastive_loss(pooled, seen, self.log_temperature.exp().clamp(min=0.02))


class ContrastiveStage:
    """Trains the CLIP text model so that its pooled vector finds the clip it describes."""

    name = "clip"

    def __init__(
        self,
        model: ContrastiveModel,
        tokenizer: Any,
        clips: LatentSet,
        *,
        seed: int,
        batch: int,
        share: Share = ALONE,
    ) -> None:
        self.module = model
        self.share = share
        self.tokenizer = tokenizer
        self.clips = clips
        self.seed = seed
        self.batch = batch

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        generator = step_generator(self.seed, self.name, step)
        chosen = torch.randint(len(self.clips), (self.batch,), generator=generator)
        texts = [self.clips.caption(int(index), variant=step) for index in chosen]
        ids, _ = _tokens(self.tokenizer, texts)
        device = next(self.module.parameters()).device
        rows, sizes = self.share.rows(self.batch), self.share.sizes(self.batch)
        latents = self.clips.latents[chosen[rows]].float().to(device)
        return self.module(ids[rows].to(device), latents, sizes), {}
