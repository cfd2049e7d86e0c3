"""The token refiner: prepares the language model's states for the transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_fast.modules.attention import attend, split_heads
from hunyuan_fast.modules.embedding import TimestepEmbedder
from hunyuan_fast.modules.mlp import MLP, EmbeddingMLP
from hunyuan_fast.ops.fused_modulation import gate_residual

DEPTH = 2
MLP_WIDTH_RATIO = 4


class RefinerBlock(nn.Module):
    """Bidirectional attention and a network over the text, each gated by the condition.

    x: (B, L, E)    condition: (B, E)    text_len: (B,), valid tokens    returns: (B, L, E)
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn_qkv = nn.Linear(dim, 3 * dim)
        self.self_attn_proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, MLP_WIDTH_RATIO * dim, F.silu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor, text_len: Tensor) -> Tensor:
        attention_gate, mlp_gate = self.adaLN_modulation(condition).chunk(2, dim=-1)

        q, k, v = split_heads(self.self_attn_qkv(self.norm1(x)), self.num_heads)
        attended = self.self_attn_proj(attend(q, k, v, text_len))
        x = gate_residual(x, attended, attention_gate)

        return gate_residual(x, self.mlp(self.norm2(x)), mlp_gate)


class RefinerStack(nn.Module):
    """The refiner's blocks in a row: a level of its own in the names of the checkpoint."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(dim, num_heads) for _ in range(DEPTH))

    def forward(self, x: Tensor, condition: Tensor, text_len: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, text_len)
        return x


class TokenRefiner(nn.Module):
    """Projects text states to the model width and refines them, conditioned on time and their mean.

    states: (B, L, text_dim), zero from text_len on    text_len: (B,)    timestep: (B,)
    returns: (B, L, E)

    In the causal language model a word sees only the words before it; here all see all.
    Source: technical report, section 4.3.
    """

    def __init__(self, text_dim: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(text_dim, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.c_embedder = EmbeddingMLP(text_dim, dim, "linear_1", "linear_2")
        self.individual_token_refiner = RefinerStack(dim, num_heads)

    def forward(self, states: Tensor, text_len: Tensor, timestep: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        mean = states.sum(1, dtype=wide) / text_len.clamp(min=1)[:, None]
        condition = self.t_embedder(timestep) + self.c_embedder(mean)

        x = self.input_embedder(states.to(self.input_embedder.weight.dtype))
        return self.individual_token_refiner(x, condition, text_len)
