"""A transformer over the processes of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.models.dit.context_parallel import parallelize_context
from hunyuan_fast.models.dit.tensor_parallel import parallelize_tensors

if TYPE_CHECKING:
    from hunyuan_fast.models.dit.model import HunyuanVideoTransformer


def parallelize(transformer: HunyuanVideoTransformer, mesh: DeviceMesh, layout: Layout) -> None:
    """Share a model, its tokens and its weights, as the layout says; it is changed in place.

    mesh: ``build_mesh(layout, ...)``. A model that was loaded in parts keeps those it has.
    Raises ValueError for a layout that this model cannot have.
    """
    layout.check_heads(transformer.config.heads_num)
    if not transformer.cuts:
        parallelize_tensors(transformer, mesh, sequence_parallel=layout.sequence_parallel)
    parallelize_context(transformer, mesh)
