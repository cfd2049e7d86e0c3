"""Single-head attention over all tokens of a clip in which no frame sees a later one."""

from __future__ import annotations

from torch import Tensor, nn

from hunyuan_fast.modules.group_norm import GroupNorm
from hunyuan_fast.ops import frame_causal_attention


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
