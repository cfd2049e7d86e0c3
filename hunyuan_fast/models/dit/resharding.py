"""From what each process holds of a transformer to the whole, and back.

A checkpoint knows nothing of the processes that wrote it: its tensors have the names and shapes of
a single process. So it can be read by any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hunyuan_fast.distributed.collectives import all_gather_parts, all_reduce_sum
from hunyuan_fast.distributed.mesh import group_of
from hunyuan_fast.distributed.wholes import Wholes
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.dit.tensor_parallel import parallelize_tensors
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.writer import save_one_by_one, taken_in_order
from hunyuan_fast.modules.fp8 import FP8


class Resharding:
    """The map between tensors of this process and whole ones.

    It is for parameters, and for whatever else has their shapes: gradients, moments of an
    optimiser, averages. What is not cut is the same on both sides.
    """

    def __init__(self, transformer: HunyuanVideoTransformer) -> None:
        self.cuts = dict(transformer.cuts)
        self.group = transformer.tokens.group

    @torch.no_grad()
    def to_canonical(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor, on every process of the group, each of which must call this.

        name: of the parameter that the tensor is, or belongs to
        """
        cut = self.cuts.get(name)
        if cut is None or self.group is None:
            return tensor.detach()
        self._check(name, tensor, cut.dim, cut.sizes[cut.rank])
        # bytes, since not every library can send every dtype
        rows = tensor.detach().movedim(cut.dim, 0).contiguous()
        plain = rows.view(torch.uint8) if rows.dtype == FP8 else rows
        held = all_gather_parts(plain, cut.sizes, self.group, 0).view(rows.dtype)
        return cut.arrange(held.movedim(0, cut.dim))

    @torch.no_grad()
    def from_canonical(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a whole tensor, in memory of its own if it is cut."""
        cut = self.cuts.get(name)
        if cut is None:
            return tensor.detach()
        self._check(name, tensor, cut.dim, sum(cut.parts))
        return cut.take(tensor.detach())

    def whole_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole, from that of what this process holds."""
        whole, cut = list(shape), self.cuts.get(name)
        if cut is not None:
            whole[cut.dim] = sum(cut.parts)
        return tuple(whole)

    def _check(self, name: str, tensor: Tensor, dim: int, size: int) -> None:
        if tensor.dim() <= dim or tensor.shape[dim] != size:
            raise ValueError(
                f"{name} must have {size} rows along dim {dim}, got {tuple(tensor.shape)}"
            )


class _Gathered:
    """Whole tensors of a model one after the other; the processes that hold parts all take part.

    forms: tensors like them on the meta device    parted: whether "data" holds parts of them
    """

    def __init__(self, transformer: HunyuanVideoTransformer) -> None:
        resharding, self._state = Resharding(transformer), transformer.state_dict()
        self._wholes = Wholes(transformer, resharding)
        self.parted = any(isinstance(x, DTensor) for x in self._state.values())
        self.forms = {
            name: torch.empty(resharding.whole_shape(name, x.shape), dtype=x.dtype, device="meta")
            for name, x in self._state.items()
        }
        rules = HunyuanVideoTransformer.checkpoint_names().rules(transformer.config)
        self._names = iter(taken_in_order(self.forms, rules))

    def take(self, name: str) -> Tensor:
        """The next one."""
        assert next(self._names) == name, "all processes go through the names in one order"
        return self._wholes.gather(name, self._state[name])

    def finish(self) -> None:
        """Take part in gathering what nobody here has taken."""
        for name in self._names:
            self._wholes.gather(name, self._state[name])


def save_pretrained(
    transformer: HunyuanVideoTransformer,
    mesh: DeviceMesh,
    path: str | Path,
    *,
    layout: Literal["native", "diffusers"] = "native",
    max_shard_bytes: int = 2 * 2**30,
) -> None:
    """``transformer.save_pretrained`` of a single process, called by all processes of the mesh.

    The first one writes, tensor by tensor, what all of them gather: one whole tensor at a time is
    in its memory, or two where one is the scale of the other. All return when the folder is there.
    Raises CheckpointError on every process when it could not be written.
    """
    data, shards = group_of(mesh, "data"), group_of(mesh, "tp")
    first_copy = data is None or data.rank() == 0
    writes = first_copy and (shards is None or shards.rank() == 0)
    failure: Exception | None = None
    gathered = _Gathered(transformer)
    if writes:
        try:
            save_one_by_one(
                gathered.forms,
                gathered.take,
                path,
                config=transformer.config,
                component=HunyuanVideoTransformer.component,
                names=HunyuanVideoTransformer.checkpoint_names(),
                layout=layout,
                max_shard_bytes=max_shard_bytes,
            )
        except Exception as error:
            failure = error
    if first_copy or gathered.parted:
        gathered.finish()
    failed = torch.tensor([int(failure is not None)], device=mesh.device_type)
    for group in (shards, data):
        failed = failed if group is None else all_reduce_sum(failed, group)
    if failure is not None:
        raise failure
    if failed.item():
        raise CheckpointError(f"{path}: the first process could not write the model, see its error")


def load_pretrained(
    path_or_repo: str | Path,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool = True,
    **options: Any,
) -> HunyuanVideoTransformer:
    """The part of this process of a stored model, as ``parallelize_tensors`` makes it.

    options: of ``HunyuanVideoTransformer.from_pretrained``. With ``verify=False`` no more is read
        from safetensors than is held; digests are of whole tensors.
    """

    def share(transformer: HunyuanVideoTransformer) -> None:
        parallelize_tensors(transformer, mesh, sequence_parallel=sequence_parallel)

    return HunyuanVideoTransformer.from_pretrained(path_or_repo, share=share, **options)
