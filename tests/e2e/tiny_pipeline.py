"""A whole pipeline of random weights, small enough to run in a fraction of a second."""

from pathlib import Path

import torch

COLOURS, SHAPES = ["red", "blue", "green"], ["circle", "square", "star"]
WORDS = [*COLOURS, *SHAPES, "a", "moving", "left", "right", "up", "down", "still", "on", "the"]
TEMPLATE = "system : describe the video user : {} end"


def _tokenizer(*, closed: bool):
    """Whole words as tokens; ``closed`` ends every text with the end token, as CLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    template_words = TEMPLATE.replace("{}", "").split()
    vocabulary = dict.fromkeys(["<start>", "<end>", "<pad>", "<unk>", *WORDS, *template_words])
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>" if closed else "<start> $A",
        special_tokens=[("<start>", 0), ("<end>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def build():
    """The pipeline; 16 pixels and 5 frames by default, 3 steps."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    from hunyuan_fast import HunyuanVideoPipeline
    from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
    from hunyuan_fast.models.text import CLIPTextEncoder, LLMTextEncoder, PromptTemplate
    from hunyuan_fast.pipelines import GenerationDefaults, PipelineSettings

    torch.manual_seed(0)
    llm_tokenizer, clip_tokenizer = _tokenizer(closed=False), _tokenizer(closed=True)
    before = TEMPLATE.split("{}")[0]
    template = PromptTemplate(
        template=TEMPLATE, crop_start=len(llm_tokenizer(before)["input_ids"]), max_length=32
    )
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(llm_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    transformer = HunyuanVideoTransformer(
        hidden_size=32,
        heads_num=2,
        mm_double_blocks_depth=1,
        mm_single_blocks_depth=1,
        rope_dim_list=(4, 6, 6),
        in_channels=4,
        out_channels=4,
        text_states_dim=16,
        text_states_dim_2=16,
    )
    with torch.no_grad():  # the modulation and the output start at zero: wake them up
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae = HunyuanVideoVAE(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    settings = PipelineSettings(
        prompt_template=template,
        generation=GenerationDefaults(
            height=32, width=32, num_frames=5, num_inference_steps=3, fps=8
        ),
    )
    return HunyuanVideoPipeline(
        transformer,
        vae,
        LLMTextEncoder(llama, llm_tokenizer, template, skip_layer=1),
        CLIPTextEncoder(clip, clip_tokenizer, max_length=77),
        settings,
    )


def save(folder: Path) -> Path:
    """Write the pipeline into ``folder``."""
    build().save_pretrained(folder)
    return folder
