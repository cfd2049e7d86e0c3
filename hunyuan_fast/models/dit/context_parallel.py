"""One video over several processes: each keeps some of its tokens from the first layer to the last.

The text refiner and the modulations, which are small, are computed by every process. Tokens meet in
attention alone, and at the end in the velocity, which every process returns whole. A loss that is
the same everywhere then gives every process ranks times its share of a parameter's gradient: the
mean over the processes is the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.collectives import rank_in, size_of
from hunyuan_fast.distributed.mesh import group_of
from hunyuan_fast.distributed.shards import TokenShards, part
from hunyuan_fast.modules.attention import JointAttention
from hunyuan_fast.ops.collectives import gather
from hunyuan_fast.ops.context_attention import SharedTokens, check_ring

if TYPE_CHECKING:
    from hunyuan_fast.models.dit.model import HunyuanVideoTransformer

_EVERYTHING = slice(None)


@dataclass(frozen=True)
class HeldTokens:
    """What a process has of the tokens of one call.

    video, text: which ones    num_video: how many video tokens
    valid: what attention is told: lengths (B,), or where the tokens of all processes lie
    group, sizes: who has the other video tokens, and how many each; ``None`` where nobody has
    """

    video: slice
    text: slice
    num_video: int
    valid: Tensor | SharedTokens
    group: ProcessGroup | None = None
    sizes: tuple[int, ...] = ()

    @classmethod
    def all_of_them(cls, num_video: int, text_len: Tensor) -> HeldTokens:
        """Of one process."""
        return cls(_EVERYTHING, _EVERYTHING, num_video, num_video + text_len)

    def whole(self, video: Tensor) -> Tensor:
        """The features of all video tokens, from those here: (B, L, ...)."""
        return gather(video, self.sizes, self.group)


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share the tokens of a video: all of them, and as rings of neighbours."""

    everybody: ProcessGroup
    ulysses: ProcessGroup | None
    ring: ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        """The same: groups are not copied with a model."""
        return self

    def check(self, precision: str | None, pattern: object) -> None:
        """Raise ValueError for attention that these processes do not have; None: no choice."""
        if self.ring is not None:
            check_ring(precision, pattern)

    def hold(self, num_video: int, num_text: int, text_len: Tensor) -> HeldTokens:
        """What this process has of so many tokens, of which text_len (B,) are valid text."""
        ranks, rank = size_of(self.everybody), rank_in(self.everybody)
        shards = TokenShards.split(num_video, num_text, ranks)
        kv_len = shards.kv_len(text_len)
        return HeldTokens(
            video=part(shards.video, rank),
            text=part(shards.text, rank),
            num_video=shards.video[rank],
            valid=SharedTokens(shards, kv_len, self.ulysses, self.ring),
            group=self.everybody,
            sizes=shards.video,
        )


def parallelize_context(transformer: HunyuanVideoTransformer, mesh: DeviceMesh) -> None:
    """Let the processes along "cp" of the mesh share the tokens of every call from now on.

    They must be given the same inputs, and return the same velocity. Raises ValueError where
    attention is to compute with fp8 codes or windows and there is a ring.
    """
    everybody = group_of(mesh, "cp")
    if everybody is None:
        return
    context = ContextParallel(everybody, group_of(mesh, "ulysses"), group_of(mesh, "ring"))
    for name in transformer.attention_blocks():
        attention = transformer.get_submodule(f"{name}.attention")
        assert isinstance(attention, JointAttention)
        context.check(attention.precision, attention.pattern)
    transformer.context = context
