"""Transformers whose weights, gradients and optimiser states lie once on many processes.

Everything here is torch's own: DistributedDataParallel where each process keeps all weights, and
fully_shard where each keeps a part of every one. Both average gradients over the processes of
"data", which is exact for those that have videos of their own (dp) and for those that share the
tokens of one (cp).
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from hunyuan_fast.distributed.mesh import Layout, group_of, submesh
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer


def shard_states(
    transformer: HunyuanVideoTransformer,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Divide the states of a transformer over the processes of "data", in place.

    Call it last: after weights are loaded and moved, after tensor and context parallelism, and
    before the optimiser is built. The model is called as ever. What ``layout.zero`` says:

    0: every process keeps everything, gradients are averaged while they are computed
    1: the same; ``build_optimizers`` gives each process the moments of some parameters
    2: weights, gradients and moments are parts of each tensor. The weights are gathered block by
        block in the forward pass, and parted again as the backward pass leaves a block
    3: the weights of a block are also parted again after its forward pass; the next block's are
        gathered meanwhile. Without gradients this is how weights too large for one GPU are run
    With ``layout.offload`` the parts wait in host memory.

    param_dtype: of gathered weights and of what is computed with them; None: as they are kept
    reduce_dtype: in which parted gradients are averaged; None: that of the weights as they are
        kept, float32 if it is narrower
    Raises ValueError for a param_dtype that goes with no parts.
    """
    if layout.zero >= 2:
        own = next(transformer.parameters()).dtype
        reduce_dtype = reduce_dtype or torch.promote_types(own, torch.float32)
        # inputs stay: times and positions are float32 whatever the weights are
        policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
        _shard(transformer, mesh, layout, policy)
        return
    if param_dtype is not None:
        raise ValueError(
            f"param_dtype must go with zero = 2 or 3, got {param_dtype} with zero = {layout.zero}; "
            "convert the model, or use autocast"
        )
    average_gradients(transformer, mesh)


def average_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let any module's gradients be averages over "data"; its weights become those of rank 0."""
    group = group_of(mesh, "data")
    if group is not None and any(p.requires_grad for p in module.parameters()):
        replicate(module, process_group=group, gradient_as_bucket_view=True)


def _shard(
    transformer: HunyuanVideoTransformer,
    mesh: DeviceMesh,
    layout: Layout,
    policy: MixedPrecisionPolicy,
) -> None:
    """Every block is gathered by itself; what is left, small things at both ends, together."""
    # memory that is pinned can be copied while kernels run, and only a driver can pin it
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    again = layout.zero == 3

    def shard(module: nn.Module, *, reshard: bool) -> FSDPModule:
        fully_shard(
            module,
            mesh=submesh(mesh, "data"),
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=offload if layout.offload else OffloadPolicy(),
        )
        return cast(FSDPModule, module)

    refiner = transformer.txt_in.individual_token_refiner.blocks
    blocks = (*refiner, *transformer.double_blocks, *transformer.single_blocks)
    sharded = [shard(block, reshard=again) for block in blocks]
    # the whole model ends where its backward pass begins
    shard(transformer, reshard=False)
    if again:
        for block, following in pairwise(sharded):
            block.set_modules_to_forward_prefetch([following])
