"""See who answers each op here, and name another implementation for a while.

python examples/choose_kernels.py
"""

import torch

import hunyuan_fast
from hunyuan_fast.dispatch import explain
from hunyuan_fast.ops import layer_norm_modulate

print(hunyuan_fast.report())

x = torch.randn(2, 100, 64)
shift, scale = torch.randn(2, 2, 64)
usual = layer_norm_modulate(x, shift, scale)
with hunyuan_fast.use("reference", "fused_modulation"):
    reference = layer_norm_modulate(x, shift, scale)
print("why not the others:", explain("fused_modulation", x, shift, scale, 1e-6))
print("largest difference:", (usual - reference).abs().max().item())
