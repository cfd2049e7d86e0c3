"""Single-head attention over all tokens of a clip in which no frame sees a later one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frame_causal_attention(q: Tensor, k: Tensor, v: Tensor, *, tokens_per_frame: int) -> Tensor:
    """Attention where a token sees every token of its own frame and of earlier frames.

    q (B, Q, N, D), k, v (B, L, N, D), frame by frame, Q and L multiples of tokens_per_frame;
    with Q < L the queries are those of the last frames. Returns (B, Q, N, D).
    Each frame's queries meet exactly the keys they may see, so no mask is ever built and
    memory grows linearly with L wherever torch has a fused attention kernel.
    """
    queries, tokens = q.shape[1], k.shape[1]
    for name, length in (("q", queries), ("k", tokens)):
        if tokens_per_frame <= 0 or length % tokens_per_frame:
            raise ValueError(
                f"{name} must hold whole frames of tokens_per_frame = {tokens_per_frame}, "
                f"got {length}"
            )
    if queries > tokens:
        raise ValueError(f"q must not be longer than k, got {queries} and {tokens}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    earlier = tokens - queries
    frames = [
        F.scaled_dot_product_attention(
            q[:, :, end - tokens_per_frame : end],
            k[:, :, : earlier + end],
            v[:, :, : earlier + end],
        )
        for end in range(tokens_per_frame, queries + 1, tokens_per_frame)
    ]
    return torch.cat(frames, dim=2).transpose(1, 2)


class FrameCausalAttention(nn.Module):
    """The VAE's mid attention with its group norm and residual: (B, C, T, H, W) -> same.

    One head of C channels; tokens are ordered frame, row, column.
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # a list of one: the checkpoint calls this layer "to_out.0"
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, height, width = x.shape
        # contiguous: torch adds up channels-last values less exactly (see group_norm.py)
        tokens = self.group_norm(x.contiguous()).flatten(2).transpose(1, 2)
        heads = (batch, -1, 1, channels)
        out = frame_causal_attention(
            self.to_q(tokens).view(heads),
            self.to_k(tokens).view(heads),
            self.to_v(tokens).view(heads),
            tokens_per_frame=height * width,
        )
        out = self.to_out[0](out.reshape(batch, -1, channels))
        return x + out.transpose(1, 2).reshape(x.shape)
