"""Layouts of a job over GPUs: which there are, and why some cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from hunyuan_fast.planning.work import Job

MOST_GPUS = 4096


@dataclass(frozen=True, order=True)
class Layout:
    """How many GPUs share what, in the words of the command line.

    dp: groups with videos of their own
    ring, ulysses: the two factors of cp, GPUs that share the tokens of one video
    tp: GPUs that share each weight of the blocks
    sequence_parallel: what lies between shared weights is split by tokens within tp
    zero: what the dp x cp GPUs keep once. 1: optimiser, 2: gradients too, 3: weights too
    recompute: keep only the inputs of blocks for backward
    offload: with zero 3, weights (in training all states) wait in host memory
    """

    dp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    recompute: bool = False
    offload: bool = False

    @property
    def cp(self) -> int:
        """GPUs that share the tokens of one video."""
        return self.ring * self.ulysses

    @property
    def data(self) -> int:
        """GPUs over which weights and states can be sharded."""
        return self.dp * self.cp

    @property
    def gpus(self) -> int:
        """GPUs of the whole layout."""
        return self.data * self.tp

    def __str__(self) -> str:
        words = [f"dp {self.dp}", f"cp {self.cp}"]
        if self.cp > 1:
            words[-1] += f" (ring {self.ring} x ulysses {self.ulysses})"
        words.append(f"tp {self.tp}" + ("" if self.tp == 1 or self.sequence_parallel else " no sp"))
        if self.zero:
            words.append(f"zero {self.zero}")
        words += [name for name in ("recompute", "offload") if getattr(self, name)]
        return ", ".join(words)


@dataclass(frozen=True)
class Group:
    """`size` GPUs, each `stride` ranks from the next."""

    size: int
    stride: int

    def within(self, node: int) -> int:
        """How many of them are in the same node."""
        return min(self.size, max(1, node // self.stride))


def ulysses_group(layout: Layout) -> Group:
    """GPUs that exchange heads for tokens. Those of a tp group have adjacent ranks."""
    return Group(layout.ulysses, layout.tp)


def ring_group(layout: Layout) -> Group:
    """GPUs that pass keys and values around."""
    return Group(layout.ring, layout.tp * layout.ulysses)


def data_group(layout: Layout) -> Group:
    """GPUs over which weights are sharded and gradients averaged; dp is farthest apart."""
    return Group(layout.data, layout.tp)


def objections(layout: Layout, job: Job) -> list[str]:
    """Why this layout cannot run this job, in sentences; none if it can."""
    found = []
    heads, videos = job.config.heads_num, job.videos
    what = "samples of a step" if job.training else "videos"
    if heads % layout.tp:
        found.append(f"tp {layout.tp} does not divide the {heads} heads")
    elif layout.ulysses > heads // layout.tp:
        found.append(
            f"ulysses {layout.ulysses} is more than the {heads // layout.tp} heads of each GPU: "
            "some would have none"
        )
    if job.config.mlp_width % layout.tp:
        found.append(f"tp {layout.tp} does not divide the {job.config.mlp_width} hidden features")
    if layout.dp > videos:
        found.append(f"dp {layout.dp} is more than the {videos} {what}: some would have nothing")
    if layout.cp > job.video_tokens:
        found.append(f"cp {layout.cp} is more than the {job.video_tokens} tokens of a video")
    if layout.sequence_parallel and layout.tp == 1:
        found.append("sequence parallelism splits within tp, and tp is 1")
    if layout.zero and layout.data == 1:
        found.append(f"zero {layout.zero} shards over dp x cp, and that is one GPU")
    if layout.zero in (1, 2) and not job.training:
        found.append(f"zero {layout.zero} shards what only training has")
    if layout.recompute and not job.training:
        found.append("nothing is kept for a backward pass, so nothing need be computed again")
    if layout.offload and layout.zero != 3:
        found.append("offload is for weights that are sharded (zero 3)")
    return found


@lru_cache
def sizes(most: int) -> tuple[int, ...]:
    """Sizes that are tried: 1, 3, 5, 7, 9 and 15 times powers of two.

    The sizes for fewer GPUs are among those for more, so a plan for more is never slower: it may
    leave some idle.
    """
    found = []
    for odd in (1, 3, 5, 7, 9, 15):
        size = odd
        while size <= most:
            found.append(size)
            size *= 2
    return tuple(sorted(found))


def geometries(job: Job, gpus: int) -> Iterator[Layout]:
    """All ways to share the job among at most `gpus` GPUs, without regard to states."""
    if not 1 <= gpus <= MOST_GPUS:
        raise ValueError(f"gpus must be from 1 to {MOST_GPUS}, got {gpus}")
    heads = job.config.heads_num
    for tp in (n for n in range(1, heads + 1) if heads % n == 0):
        if job.config.mlp_width % tp:
            continue
        for ulysses in _ulysses(heads // tp):
            for ring in sizes(min(gpus // (tp * ulysses), job.video_tokens // ulysses)):
                for dp in sizes(min(gpus // (tp * ulysses * ring), job.videos)):
                    # splitting by tokens within tp sends the same bytes and keeps fewer
                    yield Layout(dp, ring, ulysses, tp, sequence_parallel=tp > 1)


@lru_cache
def _ulysses(heads: int) -> tuple[int, ...]:
    """Divisors of the heads, and powers of two: a few more heads for some may fit a node."""
    powers = {1 << n for n in range(heads.bit_length())}
    return tuple(sorted({n for n in range(1, heads + 1) if heads % n == 0} | powers))


def states(geometry: Layout, job: Job) -> Iterator[Layout]:
    """The ways to keep weights and states in a geometry, from the fastest to the smallest."""
    rest = (geometry.dp, geometry.ring, geometry.ulysses, geometry.tp, geometry.sequence_parallel)
    if not job.training:
        yield geometry
        if geometry.data > 1:
            yield Layout(*rest, zero=3)
            yield Layout(*rest, zero=3, offload=True)
        return
    for recompute in (False, True):
        yield Layout(*rest, zero=0, recompute=recompute)
        if geometry.data > 1:
            for zero in (1, 2, 3):
                yield Layout(*rest, zero=zero, recompute=recompute)
            yield Layout(*rest, zero=3, recompute=recompute, offload=True)
