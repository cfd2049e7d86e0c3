"""The public functions over tensors: checked, differentiable, fit for ``torch.compile``."""

from hunyuan_fast.ops.causal_conv3d import causal_conv3d, upsample_causal_conv3d
from hunyuan_fast.ops.context_attention import ulysses_attention, usp_attention
from hunyuan_fast.ops.fp8_attention import fp8_attention
from hunyuan_fast.ops.frame_causal_attention import frame_causal_attention
from hunyuan_fast.ops.fused_modulation import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
)
from hunyuan_fast.ops.gelu_tanh import concat_gelu_tanh, gelu_tanh
from hunyuan_fast.ops.group_norm_silu import (
    group_norm_affine,
    group_norm_silu,
    group_norm_stats,
    merge_group_norm_stats,
)
from hunyuan_fast.ops.group_norm_silu_conv3d import group_norm_silu_conv3d
from hunyuan_fast.ops.norm_rope_attention import norm_rope_attention
from hunyuan_fast.ops.qk_norm_rope import qk_norm_rope
from hunyuan_fast.ops.ring_attention import merge_attention, ring_attention
from hunyuan_fast.ops.rope3d_attention import apply_rope3d, attention, rope3d_attention
from hunyuan_fast.ops.sliding_tile_attention import SlidingTiles, sliding_tile_attention

__all__ = [
    "SlidingTiles",
    "apply_rope3d",
    "attention",
    "causal_conv3d",
    "concat_gelu_tanh",
    "fp8_attention",
    "frame_causal_attention",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "gelu_tanh",
    "group_norm_affine",
    "group_norm_silu",
    "group_norm_silu_conv3d",
    "group_norm_stats",
    "layer_norm_modulate",
    "merge_attention",
    "merge_group_norm_stats",
    "norm_rope_attention",
    "qk_norm_rope",
    "ring_attention",
    "rope3d_attention",
    "sliding_tile_attention",
    "ulysses_attention",
    "upsample_causal_conv3d",
    "usp_attention",
]
