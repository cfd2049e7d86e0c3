"""Single-head attention over all tokens of a clip in which no frame sees a later one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_fast.modules.group_norm import GroupNorm


def frame_causal_attention(q: Tensor, k: Tensor, v: Tensor, *, tokens_per_frame: int) -> Tensor:
    """Attention where a token sees every token of its own frame and of earlier frames.

    q, k, v (B, L, N, D), L a multiple of tokens_per_frame, frame by frame. Returns (B, L, N, D).
    Each frame's queries meet exactly the keys they may see, so no mask is ever built and
    memory grows linearly with L wherever torch has a fused attention kernel.
    """
    tokens = q.shape[1]
    if tokens_per_frame <= 0 or tokens % tokens_per_frame:
        raise ValueError(
            f"q must hold whole frames of tokens_per_frame = {tokens_per_frame}, got {tokens}"
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    frames = [
        F.scaled_dot_product_attention(
            q[:, :, end - tokens_per_frame : end], k[:, :, :end], v[:, :, :end]
        )
        for end in range(tokens_per_frame, tokens + 1, tokens_per_frame)
    ]
    return torch.cat(frames, dim=2).transpose(1, 2)


class FrameCausalAttention(nn.Module):
    """The VAE's mid attention with its group norm and residual: (B, C, T, H, W) -> same.

    One head of C channels; tokens are ordered frame, row, column.
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # a list of one: the checkpoint calls this layer "to_out.0"
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        heads = (batch, -1, 1, channels)
        out = frame_causal_attention(
            self.to_q(tokens).view(heads),
            self.to_k(tokens).view(heads),
            self.to_v(tokens).view(heads),
            tokens_per_frame=height * width,
        )
        out = self.to_out[0](out.reshape(batch, -1, channels))
        return x + out.transpose(1, 2).reshape(x.shape)
