"""The transformer blocks: two streams that meet in attention, then one stream for all tokens."""

from functools import partial

import torch
from torch import Tensor, nn

from hunyuan_fast.modules.attention import JointAttention
from hunyuan_fast.modules.mlp import MLP, gelu
from hunyuan_fast.modules.modulation import Modulation
from hunyuan_fast.modules.norm import RMSNorm
from hunyuan_fast.modules.rotary import Tables
from hunyuan_fast.ops.context_attention import SharedTokens
from hunyuan_fast.ops.fused_modulation import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
)
from hunyuan_fast.ops.gelu_tanh import concat_gelu_tanh, gelu_tanh

STREAMS = ("img", "txt")


class DoubleStreamBlock(nn.Module):
    """Video and text keep weights of their own and see each other in one joint attention.

    img: (B, L_video, E)    txt: (B, L_text, E)    vec: (B, E)
    rotary: cos and sin, each (L_video, D)
    kv_len: as ``JointAttention`` takes it: (B,), L_video and the valid text tokens of each sample
    returns: img, txt

    Both streams hold the same layers, under the prefixes ``img_`` and ``txt_``.
    Source: technical report, section 4.2 (dual-stream to single-stream design); Esser et al.,
    "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4.
    """

    def __init__(self, dim: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = JointAttention()
        for stream in STREAMS:
            layers = {
                "mod": Modulation(dim, 6),
                "attn_qkv": nn.Linear(dim, 3 * dim),
                "attn_q_norm": RMSNorm(dim // num_heads),
                "attn_k_norm": RMSNorm(dim // num_heads),
                "attn_proj": nn.Linear(dim, dim),
                "mlp": MLP(dim, mlp_width, gelu),
            }
            for name, layer in layers.items():
                self.add_module(f"{stream}_{name}", layer)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rotary: Tables, kv_len: Tensor | SharedTokens
    ) -> tuple[Tensor, Tensor]:
        streams = {"img": img, "txt": txt}
        vectors = {stream: self._layer(stream, "mod")(vec) for stream in STREAMS}

        # attention over both streams, video first
        packed = {
            stream: self._layer(stream, "attn_qkv")(
                layer_norm_modulate(streams[stream], *vectors[stream][:2])
            )
            for stream in STREAMS
        }
        num_video = packed["img"].shape[1]
        attended = self.attention.of_packed(
            packed["img"],
            self._norms("img"),
            rotary,
            kv_len,
            num_heads=self.num_heads,
            text_qkv=packed["txt"],
            text_norms=self._norms("txt"),
        ).flatten(2)

        # each stream goes on alone
        img = self._finish("img", img, attended[:, :num_video], *vectors["img"][2:])
        txt = self._finish("txt", txt, attended[:, num_video:], *vectors["txt"][2:])
        return img, txt

    def _layer(self, stream: str, name: str) -> nn.Module:
        return getattr(self, f"{stream}_{name}")

    def _norms(self, stream: str) -> tuple[Tensor, Tensor]:
        """The weights of the norms of queries and keys."""
        names = ("attn_q_norm", "attn_k_norm")
        q_weight, k_weight = (self._layer(stream, name)() for name in names)
        return q_weight, k_weight

    def _finish(
        self,
        stream: str,
        x: Tensor,
        attended: Tensor,
        gate1: Tensor,
        shift2: Tensor,
        scale2: Tensor,
        gate2: Tensor,
    ) -> Tensor:
        """The residual sums of attention and of the network that follows it, for one stream."""
        projected = self._layer(stream, "attn_proj")(attended)
        x, modulated = gate_residual_layer_norm_modulate(x, projected, gate1, shift2, scale2)
        return gate_residual(x, self._layer(stream, "mlp")(modulated), gate2)


class SingleStreamBlock(nn.Module):
    """Video and text share all weights; attention and network work side by side on the same input.

    x: (B, L, E), video tokens before text tokens    vec: (B, E)
    rotary: cos and sin, each (L_video, D)
    kv_len: as ``JointAttention`` takes it: (B,), L_video and the valid text tokens of each sample
    returns: (B, L, E)

    Source: technical report, section 4.2; Dehghani et al., "Scaling Vision Transformers to 22
    Billion Parameters", section 2 (parallel layers).
    """

    def __init__(self, dim: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = JointAttention()
        self.widths = [3 * dim, mlp_width]
        self.linear1 = nn.Linear(dim, sum(self.widths))
        self.linear2 = nn.Linear(dim + mlp_width, dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.modulation = Modulation(dim, 3)

    def forward(
        self, x: Tensor, vec: Tensor, rotary: Tables, kv_len: Tensor | SharedTokens
    ) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        packed = self.linear1(layer_norm_modulate(x, shift, scale))
        qkv, hidden = packed.split(self.widths, dim=-1)
        return gate_residual(x, self.linear2(self._join(qkv, rotary, kv_len, hidden)), gate)

    def _join(
        self, qkv: Tensor, rotary: Tables, kv_len: Tensor | SharedTokens, hidden: Tensor
    ) -> Tensor:
        """What attention gives, and beside it the activated features: (B, L, E + mlp_width)."""
        attend = partial(
            self.attention.of_packed,
            *(qkv, (self.q_norm(), self.k_norm()), rotary, kv_len),
            num_heads=self.num_heads,
        )
        if torch.is_grad_enabled():
            return concat_gelu_tanh(attend().flatten(2), hidden)
        # without gradients both write to their place, and nothing is copied
        dim = self.widths[0] // 3
        joined = qkv.new_empty(*qkv.shape[:2], dim + self.widths[1])
        attend(out=joined[..., :dim].unflatten(-1, (self.num_heads, -1)))
        gelu_tanh(hidden, out=joined[..., dim:])
        return joined


class FinalLayer(nn.Module):
    """Modulated norm and projection of each video token to the velocity of its patch.

    x: (B, L, E)    vec: (B, E)    returns: (B, L, patch_features)
    """

    def __init__(self, dim: int, patch_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, patch_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        return self.linear(layer_norm_modulate(x, shift, scale).to(self.linear.weight.dtype))
