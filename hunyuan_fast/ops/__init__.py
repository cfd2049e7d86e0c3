"""The public functions over tensors: checked, differentiable, fit for ``torch.compile``."""

from hunyuan_fast.ops.fused_modulation import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
)
from hunyuan_fast.ops.rope3d_attention import apply_rope3d, attention, rope3d_attention

__all__ = [
    "apply_rope3d",
    "attention",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "rope3d_attention",
]
