"""Seconds that blocks and steps take in a layout: arithmetic, memory, links, and what overlaps."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from operator import attrgetter

from hunyuan_fast.planning.hardware import Hardware
from hunyuan_fast.planning.layouts import (
    Group,
    Layout,
    data_group,
    ring_group,
    ulysses_group,
)
from hunyuan_fast.planning.links import (
    exchange_seconds,
    gather_seconds,
    hop_seconds,
    reduce_seconds,
)
from hunyuan_fast.planning.memory import OPTIMISER_BYTES, local_parameters, rows_of
from hunyuan_fast.planning.traffic import (
    GRADIENT_BYTES,
    ring_attention_bytes,
    tensor_parallel_collectives,
    ulysses_bytes,
    ulysses_messages,
)
from hunyuan_fast.planning.work import (
    BACKWARD,
    FORWARD,
    KERNELS,
    KINDS,
    OUTSIDE_KERNELS,
    Job,
    Kind,
    Passes,
)

# Bytes of an element when two parts of attention are merged: the new part is read, the float32 sum
# of what came before read and written.
MERGE_BYTES = 2 + 4 + 4
# Bytes of a parameter in a step of AdamW: weight, moments and gradient read, weight and moments
# written, the copy to compute with written.
STEP_BYTES = 4 * 4 + 3 * 4 + 2


@dataclass(frozen=True, kw_only=True)
class Practice:
    """How a program goes about it; the defaults are this one.

    whole_text: every context-parallel rank has all text tokens
    passes: how many times the reads and writes that `work` counts
    shared_decode: the autoencoder's work is shared out over the GPUs of a video
    decode_flops: of one video, in place of that of the clip as a whole
    """

    whole_text: bool = False
    passes: float = 1.0
    shared_decode: bool = True
    decode_flops: float | None = None


@dataclass(slots=True)
class Seconds:
    """Where the time goes. What is hidden behind arithmetic does not count.

    matrices, attention: bound by arithmetic; memory: by reads and writes; kernels: by starting them
    ring, ulysses, tp: exposed communication within blocks
    weights, gradients: exposed gathers and reductions of what is sharded or replicated
    host: exposed transfers from and to host memory; optimiser: its step
    """

    matrices: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    kernels: float = 0.0
    ring: float = 0.0
    ulysses: float = 0.0
    tp: float = 0.0
    weights: float = 0.0
    gradients: float = 0.0
    host: float = 0.0
    optimiser: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(_parts(self))

    @property
    def compute(self) -> float:
        """What arithmetic bounds."""
        return self.matrices + self.attention

    @property
    def local(self) -> float:
        """What needs no other GPU, within blocks: behind it, weights and gradients can hide."""
        return self.matrices + self.attention + self.memory + self.kernels

    @property
    def exposed(self) -> float:
        """Communication that nothing hides."""
        return self.ring + self.ulysses + self.tp + self.weights + self.gradients + self.host

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(_parts(self), _parts(other), strict=True)))

    def __mul__(self, count: float) -> Seconds:
        return Seconds(*(count * value for value in _parts(self)))


# a search adds up thousands of them: `dataclasses.astuple` takes ten times as long
_parts = attrgetter(*Seconds.__slots__)

Blocks = dict[Kind, tuple[Seconds, Seconds]]


class Clock:
    """Times blocks and steps of one job on one kind of hardware."""

    def __init__(self, job: Job, hardware: Hardware, practice: Practice | None = None) -> None:
        self.job, self.hardware = job, hardware
        self.practice = practice or Practice()
        self._blocks: dict[tuple[int, int, int, bool], Blocks] = {}

    def blocks(self, layout: Layout) -> Blocks:
        """Forward and backward of one block of each kind, for one video."""
        key = (layout.ring, layout.ulysses, layout.tp, layout.sequence_parallel)
        if key not in self._blocks:
            self._blocks[key] = {
                kind: (self._block(kind, layout, False), self._block(kind, layout, True))
                for kind in KINDS
            }
        return self._blocks[key]

    def passes(self, layout: Layout) -> tuple[Seconds, Seconds]:
        """Forward and backward of one video through the whole transformer, unsharded."""
        blocks, outside = self.blocks(layout), self._outside(layout)
        both = [outside, outside * 2]
        for kind in KINDS:
            for way, seconds in enumerate(blocks[kind]):
                both[way] += seconds * self.job.depth(kind)
        return both[0], both[1]

    def step(self, layout: Layout) -> Seconds:
        """One step of the whole job: every video once, in training with update of the weights."""
        turns = -(-self.job.videos // layout.dp)
        if self.job.training:
            return self._training(layout, turns)
        return self._inference(layout) * turns

    def video(self, layout: Layout) -> float:
        """Seconds of whole videos: prompt, all denoising steps, decoding."""
        turns = -(-self.job.videos // layout.dp)
        step = self.step(layout).total / turns
        return turns * (self.job.steps * step + self.text() + self.decode(layout))

    def text(self) -> float:
        """Seconds to encode one prompt: its arithmetic or the weights it reads."""
        job, hardware = self.job, self.hardware
        read = 2.0 * job.text_parameters / hardware.memory_rate
        return max(job.text_flops / hardware.gemm_rate, read)

    def decode(self, layout: Layout) -> float:
        """Seconds to decode one video, in strips of latent rows on the GPUs that share it."""
        practice, rows = self.practice, self.job.latent[1]
        flops = practice.decode_flops or self.job.decode_flops
        ranks = min(layout.cp * layout.tp, rows) if practice.shared_decode else 1
        return flops / self.hardware.conv_rate * -(-rows // ranks) / rows

    def rows(self, layout: Layout) -> int:
        """Tokens of the busiest context-parallel rank."""
        if self.practice.whole_text:
            return -(-self.job.video_tokens // layout.cp) + self.job.text_tokens
        return rows_of(layout, self.job)

    def _block(self, kind: Kind, layout: Layout, backward: bool) -> Seconds:
        rows = self.rows(layout)
        matrices, memory = self._matrices(kind, layout, rows, 2 if backward else 1)
        passes = (BACKWARD if backward else FORWARD)[kind]
        memory += self._passes(passes, layout, rows)
        attention = self._attention(layout, backward)
        ring, merge = self._ring(layout, attention, backward)
        return Seconds(
            matrices=matrices,
            attention=attention,
            memory=memory + merge,
            kernels=KERNELS[kind] * (2 if backward else 1) * self.hardware.kernel_us * 1e-6,
            ring=ring,
            ulysses=self._exchange(layout, rows, backward),
            tp=self._tensor(kind, layout, rows),
        )

    def _matrices(self, kind: Kind, layout: Layout, rows: int, times: int) -> tuple[float, float]:
        """Seconds of matrix products that arithmetic bounds, and of those that memory does."""
        hardware, job = self.hardware, self.job
        streams = [rows]
        if kind == "double":
            text = job.text_tokens if self.practice.whole_text else -(-job.text_tokens // layout.cp)
            streams = [rows - text, text]
        bound = {True: 0.0, False: 0.0}
        for tokens in streams:
            padded = -(-tokens // int(hardware.tile)) * hardware.tile
            for inputs, outputs in job.matrices(kind):
                weights = inputs * outputs / layout.tp
                arithmetic = 2.0 * padded * weights / hardware.gemm_rate
                moved = (tokens * (inputs + outputs) / layout.tp + weights) * job.weight_bytes
                traffic = moved / hardware.memory_rate
                bound[arithmetic >= traffic] += max(arithmetic, traffic) * times
        # the vectors of the modulation: every weight read for one row
        vectors = job.block_parameters(kind) - job.split_parameters(kind)
        reads = vectors * job.weight_bytes * times / hardware.memory_rate
        return bound[True], bound[False] + reads

    def _passes(self, passes: Passes, layout: Layout, rows: int) -> float:
        whole = passes.whole / (layout.tp if layout.sequence_parallel else 1)
        vectors = (passes.split / layout.tp + whole) * self.practice.passes
        moved = vectors * rows * self.job.config.hidden_size * self.job.weight_bytes
        return moved / self.hardware.memory_rate

    def _heads(self, layout: Layout) -> int:
        """Heads of the busiest GPU."""
        return -(-(self.job.config.heads_num // layout.tp) // layout.ulysses)

    def _attention(self, layout: Layout, backward: bool) -> float:
        job = self.job
        queries = -(-job.tokens // layout.ring)
        tile = int(self.hardware.tile)
        padded = -(-queries // tile) * tile
        flops = 4.0 * padded * job.tokens * self._heads(layout) * job.config.head_dim
        rate = self.hardware.attention_rate(backward=backward)
        return flops * (2.5 if backward else 1.0) / rate

    def _ring(self, layout: Layout, attention: float, backward: bool) -> tuple[float, float]:
        """Exposed seconds of the rotation, and those of merging what the hops give."""
        if layout.ring == 1:
            return 0.0, 0.0
        job, ring = self.job, layout.ring
        group = ring_group(layout)
        shard = (-(-job.tokens // ring), self._heads(layout), job.config.head_dim)
        elements = prod(shard)
        passed = ring_attention_bytes(1, *shard, job.weight_bytes, ring, backward=False)
        hop = hop_seconds(passed / (ring - 1), group, self.hardware)
        merge = (ring - 1) * elements * MERGE_BYTES / self.hardware.memory_rate
        at_once = attention / ring
        exposed = max(0.0, hop - at_once)
        if not backward:
            return (ring - 1) * exposed, merge
        # gradients of keys and values travel one hop behind; the last hop has nothing to hide it
        late = hop_seconds(2 * elements * GRADIENT_BYTES, group, self.hardware)
        return exposed + (ring - 2) * max(0.0, hop + late - at_once) + late, merge

    def _exchange(self, layout: Layout, rows: int, backward: bool) -> float:
        config, ranks = self.job.config, layout.ulysses
        sent = ulysses_bytes(
            *(1, rows, config.heads_num // layout.tp, config.head_dim, self.job.weight_bytes),
            *(ranks, backward),
        )
        group = ulysses_group(layout)
        calls = ulysses_messages(ranks)
        return calls * exchange_seconds(sent / calls, group, self.hardware) if calls else 0.0

    def _tensor(self, kind: Kind, layout: Layout, rows: int) -> float:
        size = rows * self.job.config.hidden_size * self.job.weight_bytes
        each = reduce_seconds(size, Group(layout.tp, 1), self.hardware)
        return tensor_parallel_collectives(kind) * each

    def _gather(self, kind: Kind, layout: Layout) -> tuple[float, float]:
        """Seconds to make the weights of a block whole, and to fetch our share from the host."""
        size = self.job.local_parameters(kind, layout.tp) * self.job.weight_bytes
        group = data_group(layout)
        fetch = size / layout.data / (self.hardware.host_gbs * 1e9) if layout.offload else 0.0
        return gather_seconds(size, group, self.hardware), fetch

    def _reduce(self, kind: Kind, layout: Layout) -> float:
        size = self.job.local_parameters(kind, layout.tp) * GRADIENT_BYTES
        group = data_group(layout)
        one_way = gather_seconds(size, group, self.hardware)
        return 2 * one_way if layout.zero == 0 else one_way

    def _outside(self, layout: Layout) -> Seconds:
        """What lies around the blocks, forward: patches of a rank's share, all of the text."""
        job, hardware = self.job, self.hardware
        video = -(-job.video_tokens // layout.cp)
        flops = 2.0 * (video * job.patch_parameters + job.text_tokens * job.text_in_parameters)
        return Seconds(
            matrices=flops / hardware.gemm_rate,
            memory=job.other_parameters * job.weight_bytes / hardware.memory_rate,
            kernels=OUTSIDE_KERNELS * hardware.kernel_us * 1e-6,
        )

    def _inference(self, layout: Layout) -> Seconds:
        total, blocks = self._outside(layout), self.blocks(layout)
        for kind in KINDS:
            depth, forward = self.job.depth(kind), blocks[kind][0]
            if not depth:
                continue
            total += forward * depth
            if layout.zero == 3:
                total += self._late(self._gather(kind, layout), forward) * depth
        return total

    @staticmethod
    def _late(transfer: tuple[float, float], behind: Seconds) -> Seconds:
        """What of a gather, and of the fetch before it, outlasts the work of the block before."""
        gather, fetch = transfer
        rest = max(0.0, behind.local - gather)
        return Seconds(weights=max(0.0, gather - behind.local), host=max(0.0, fetch - rest))

    def _training(self, layout: Layout, turns: int) -> Seconds:
        total, blocks = self._outside(layout) * (3 * turns), self.blocks(layout)
        shares = layout.data > 1
        for kind in KINDS:
            depth, (forward, backward) = self.job.depth(kind), blocks[kind]
            if not depth:
                continue
            behind = forward + backward if layout.recompute else backward
            total += (forward + behind) * (depth * turns)
            sharded = layout.zero == 3
            gather = self._gather(kind, layout) if sharded else (0.0, 0.0)
            if sharded:
                total += self._late(gather, forward) * (depth * turns)
            if shares:
                reduce = self._reduce(kind, layout)
                late = self._late((gather[0] + reduce, gather[1]), behind)
                again = turns if layout.zero >= 2 else 1
                total += Seconds(gradients=late.weights, host=late.host) * (depth * again)
                if sharded is False and layout.zero:  # weights of the others come after the step
                    total += Seconds(weights=self._gather(kind, layout)[0]) * depth
        return total + self._update(layout)

    def _update(self, layout: Layout) -> Seconds:
        """The optimiser's step over the weights of this GPU."""
        mine = local_parameters(layout, self.job) / (layout.data if layout.zero else 1)
        if not layout.offload:
            return Seconds(optimiser=mine * STEP_BYTES / self.hardware.memory_rate)
        # on the host: gradients go there; its memory is taken to be as fast as the way to it
        rate = self.hardware.host_gbs * 1e9
        moved = mine * (GRADIENT_BYTES + OPTIMISER_BYTES * 2)
        return Seconds(host=moved / rate)
