"""The layout of a job over its processes, checked before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMS = ("dp", "ring", "ulysses", "tp")
PRODUCTS = {
    "cp": ("ring", "ulysses"),
    "data": ("dp", "ring", "ulysses"),
    "video": ("ring", "ulysses", "tp"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes share what.

    dp: groups of processes with videos of their own
    cp: processes that share the tokens of one video (context parallel)
    ulysses: how many of those exchange heads for tokens; the other factor of cp is a ring.
        ``None``: 1, a plain ring
    tp: processes that share each weight of the blocks, by heads and channels (tensor parallel)
    sequence_parallel: what lies between the shared weights is split by tokens within tp
    zero: what is kept once in the dp x cp processes instead of in each of them. 0: nothing, 1: the
        state of the optimiser, 2: gradients too, 3: weights too
    offload: with zero = 3, weights wait in host memory

    Raises ValueError for what no job can have.
    """

    dp: int = 1
    cp: int = 1
    ulysses: int | None = None
    tp: int = 1
    sequence_parallel: bool = True
    zero: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ulysses is not None and (self.ulysses < 1 or self.cp % self.ulysses):
            raise ValueError(
                f"ulysses must divide cp = {self.cp}, got {self.ulysses}; "
                f"cp is the product of ulysses and the length of the ring"
            )
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.offload and self.zero != 3:
            raise ValueError(f"offload must go with zero = 3, got zero = {self.zero}")

    @property
    def ring(self) -> int:
        """Processes in each ring."""
        return self.cp // (self.ulysses or 1)

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.dp * self.cp * self.tp

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to share."""
        return self.world_size == 1

    def encodes(self, rank: int) -> bool:
        """Whether this process encodes prompts: the first one of those that make a video does."""
        return rank % (self.cp * self.tp) == 0

    def check_world(self, world_size: int) -> None:
        """Raise ValueError when the job has another number of processes."""
        if world_size != self.world_size:
            raise ValueError(
                f"dp x cp x tp must be the number of processes, {world_size}, "
                f"got {self.dp} x {self.cp} x {self.tp} = {self.world_size}; start as many with "
                f"torchrun --nproc-per-node {self.world_size}, or change the layout"
            )

    def check_heads(self, num_heads: int) -> None:
        """Raise ValueError when attention of so many heads cannot be shared like this."""
        if num_heads % self.tp:
            fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            raise ValueError(
                f"tp must divide the {num_heads} heads of the model, got {self.tp}; "
                f"it can be one of {fitting}"
            )
        heads = num_heads // self.tp
        if (self.ulysses or 1) > heads:
            raise ValueError(
                f"ulysses must be at most the {heads} heads of each process, got {self.ulysses}; "
                "let a ring be the rest of cp"
            )


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh of a job that is under way, with the dims of :data:`DIMS` and :data:`PRODUCTS`.

    Processes of one tp group have adjacent ranks, so that they share the fastest links; those of
    different dp are farthest apart.
    """
    sizes = (layout.dp, layout.ring, layout.ulysses or 1, layout.tp)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=DIMS)
    for name in PRODUCTS:
        submesh(mesh, name)
    return mesh


def submesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The mesh of one dim, or of one product of dims, that this process is in."""
    if name in PRODUCTS:
        return mesh[PRODUCTS[name]]._flatten(name)  # made once, then found
    return mesh[name]


def group_of(mesh: DeviceMesh, name: str) -> ProcessGroup | None:
    """The group of this process along a dim of the mesh, ``None`` if it has nobody else in it."""
    along = submesh(mesh, name)
    return None if math.prod(along.shape) == 1 else along.get_group()
