"""The HunyuanVideo diffusion transformer."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hunyuan_fast.models.dit.blocks import DoubleStreamBlock, FinalLayer, SingleStreamBlock
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.dit.context_parallel import ContextParallel, HeldTokens
from hunyuan_fast.models.dit.inputs import check_inputs, pack_text
from hunyuan_fast.models.dit.refiner import TokenRefiner
from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.models.weights import Pretrained
from hunyuan_fast.modules.attention import JointAttention
from hunyuan_fast.modules.embedding import PatchEmbedding, TimestepEmbedder, unpatchify
from hunyuan_fast.modules.mlp import EmbeddingMLP
from hunyuan_fast.modules.rotary import rotary_tables
from hunyuan_fast.modules.tensor_parallel import Tokens
from hunyuan_fast.ops.sliding_tile_attention import SlidingTiles


class HunyuanVideoTransformer(Pretrained, nn.Module):
    """Predicts the velocity (noise - data) of noisy video latents, given the time and a prompt.

    Built from the keywords of :class:`TransformerConfig`. Parameters are named as in the official
    checkpoint.
    Source: technical report, section 4.2 (unified image and video generative architecture).
    """

    config_class: ClassVar[type[TransformerConfig]] = TransformerConfig
    component: ClassVar[str] = "transformer"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        config = self.config = TransformerConfig(**kwargs)
        self.gradient_checkpointing = False
        self.attention_grid: tuple[int, int, int] | None = None
        self.tokens = Tokens()  # how they lie between the layers of the blocks
        self.context: ContextParallel | None = None  # who shares the tokens of a call
        dim, sizes = config.hidden_size, (config.hidden_size, config.heads_num, config.mlp_width)

        self.img_in = PatchEmbedding(config.patch_size, config.in_channels, dim)
        self.txt_in = TokenRefiner(config.text_states_dim, dim, config.heads_num)
        self.time_in = TimestepEmbedder(dim)
        self.vector_in = EmbeddingMLP(config.text_states_dim_2, dim, "in_layer", "out_layer")
        self.guidance_in = TimestepEmbedder(dim) if config.guidance_embed else None

        doubles, singles = config.mm_double_blocks_depth, config.mm_single_blocks_depth
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*sizes) for _ in range(doubles))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*sizes) for _ in range(singles))
        self.final_layer = FinalLayer(dim, config.out_channels * math.prod(config.patch_size))
        self.init_weights()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        pooled_text: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at the noisy ``latents``.

        latents: (B, in_channels, T, H, W), each size a multiple of the patch's
        timestep: (B,), from 0 (data) to 1000 (pure noise)
        text_states: (B, L, text_states_dim), from the language model
        text_mask: (B, L), bool or integers 0 and 1, of any pattern; what it leaves out, NaN
            included, has no influence
        pooled_text: (B, text_states_dim_2), from CLIP
        guidance: (B,), the embedded guidance scale times 1000; a model without guidance embedding
            ignores it
        returns: (B, out_channels, T, H, W), dtype of the weights

        Floating inputs may have any dtype; timestep and guidance are used in float32.
        Raises ValueError for shapes or devices that do not fit and for missing guidance, TypeError
        for dtypes.
        """
        config = self.config
        check_inputs(config, latents, timestep, text_states, text_mask, pooled_text, guidance)
        t, h, w = (
            size // patch for size, patch in zip(latents.shape[2:], config.patch_size, strict=True)
        )
        if self.attention_grid not in (None, (t, h, w)):
            raise ValueError(
                f"latents must have the grid {self.attention_grid} of the attention windows, got "
                f"{(t, h, w)}; rescale the windows, or set_attention(windows='dense')"
            )
        text_states, text_len = pack_text(text_states, text_mask)
        num_video = t * h * w
        if self.context is None:
            held = HeldTokens.all_of_them(num_video, text_len)
        else:
            held = self.context.hold(num_video, text_states.shape[1], text_len)
        tables = rotary_tables((t, h, w), config.rope_dim_list, config.rope_theta, latents.device)
        rotary = tables[0][held.video], tables[1][held.video]

        vec = self._conditioning(timestep, pooled_text, guidance)
        img = self.img_in(latents, held.video)
        txt = self.txt_in(text_states, text_len, timestep)[:, held.text]
        img, txt = self.tokens.divide(img, txt)
        for block in self.double_blocks:
            img, txt = self._run(block, img, txt, vec, rotary, held.valid)
        x = self.tokens.join(img, txt)
        del img, txt  # as large as x, and nobody reads them again
        for block in self.single_blocks:
            x = self._run(block, x, vec, rotary, held.valid)
        x = self.tokens.whole(x)

        velocity = held.whole(self.final_layer(x[:, : held.num_video], vec))
        return unpatchify(velocity, (t, h, w), config.patch_size)

    def _conditioning(
        self, timestep: Tensor, pooled_text: Tensor, guidance: Tensor | None
    ) -> Tensor:
        """The vector (B, E) that modulates every block."""
        vec = self.time_in(timestep) + self.vector_in(pooled_text)
        return vec if self.guidance_in is None else vec + self.guidance_in(guidance)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.tokens.bound(block), *inputs, use_reentrant=False)
        return block(*inputs)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the inputs of each block for the backward pass and compute the rest again."""
        self.gradient_checkpointing = enabled

    def set_attention(
        self,
        *,
        precision: str | None = None,
        windows: AttentionWindows | Literal["dense"] | None = None,
    ) -> None:
        """Choose how video and text attend to each other in all blocks; ``None`` changes nothing.

        precision: "same" as the weights, or "fp8": e4m3 codes in both products, inference only
        windows: what every head of every block sees; the model then takes latents of their grid
            alone. "dense": everything
        Raises ValueError for a choice that does not exist, for windows of another model, and for
        what processes do not have whose tokens go round a ring.
        """
        if self.context is not None:
            self.context.check(precision, windows)
        names = self.attention_blocks()
        patterns: dict[str, SlidingTiles | Literal["dense"]] = {}
        if windows == "dense":
            patterns = dict.fromkeys(names, "dense")
        elif windows is not None:
            windows.check_blocks(names, self.config.heads_num)
            patterns = {**windows.patterns(next(self.parameters()).device)}
        for name in names:
            attention = self.get_submodule(f"{name}.attention")
            assert isinstance(attention, JointAttention)
            attention.set(precision=precision, pattern=patterns.get(name))
        if windows is not None:
            self.attention_grid = None if windows == "dense" else windows.grid

    def attention_blocks(self) -> tuple[str, ...]:
        """The names of all blocks with joint attention, in the order in which they are run."""
        depths = {
            "double_blocks": len(self.double_blocks),
            "single_blocks": len(self.single_blocks),
        }
        return tuple(f"{name}.{i}" for name, depth in depths.items() for i in range(depth))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter to its value before training, as the official model does.

        Xavier uniform for the patch embedding, N(0, 0.02) for the timestep networks, zeros for all
        modulations and the last projection, so that every block begins as the identity and the
        velocity as zero; torch's own initialisation elsewhere.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        nn.init.xavier_uniform_(self.img_in.proj.weight.flatten(1))
        nn.init.zeros_(self.img_in.proj.get_parameter("bias"))
        for name, module in self.named_modules():
            if isinstance(module, TimestepEmbedder):
                for layer in ("0", "2"):
                    nn.init.normal_(module.mlp.get_parameter(f"{layer}.weight"), std=0.02)
            elif isinstance(module, nn.Linear) and _starts_at_zero(name):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)


def _starts_at_zero(name: str) -> bool:
    modulations = ("_mod.linear", "modulation.linear", "adaLN_modulation.1")
    return name.endswith(modulations) or name == "final_layer.linear"
