"""Bytes that one GPU needs for a job in a layout."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_fast.planning.layouts import Layout
from hunyuan_fast.planning.work import (
    BUSY,
    BUSY_BACKWARD,
    GATHERED,
    KEPT,
    KINDS,
    Job,
    Kind,
    Passes,
)

# Training: weights in float32 and two moments of AdamW, which the optimiser needs; gradients in
# float32; a copy of the weights to compute with.
OPTIMISER_BYTES, GRADIENT_BYTES = 4 + 8, 4
RING_BUFFERS = 6  # vectors of E: keys and values that come and go, a float32 sum of the output
ULYSSES_BUFFERS = 4  # packed heads that leave, and those that have come


PARTS = ("weights", "states", "buffers", "kept", "busy", "companions")


@dataclass(slots=True)
class Memory:
    """Bytes on one GPU at the busiest moment of a step.

    weights: those computed with; states: optimiser, gradients; buffers: of communication
    kept: for backward; busy: what lives meanwhile; companions: text models and autoencoder
    """

    weights: float
    states: float
    buffers: float
    kept: float
    busy: float
    companions: float

    @property
    def total(self) -> float:
        """All of it."""
        own = self.weights + self.states + self.buffers
        return own + self.kept + self.busy + self.companions

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(PARTS, key=lambda name: getattr(self, name))


def rows_of(layout: Layout, job: Job) -> int:
    """Tokens of the busiest context-parallel rank."""
    return -(-job.video_tokens // layout.cp) + -(-job.text_tokens // layout.cp)


def memory(layout: Layout, job: Job) -> Memory:
    """What a GPU of this layout needs."""
    unit = rows_of(layout, job) * job.config.hidden_size * job.weight_bytes
    weights, buffers = _weights(layout, job)
    buffers += RING_BUFFERS * unit / layout.tp * (layout.ring > 1)
    buffers += ULYSSES_BUFFERS * unit / layout.tp * (layout.ulysses > 1)
    if not job.training:
        busy = max(_vectors(BUSY[kind], kind, layout) for kind in KINDS if job.depth(kind))
        companions = (job.text_parameters + job.vae_parameters) * 2.0
        return Memory(weights, 0.0, buffers, 0.0, busy * unit, companions)
    kept = {kind: _vectors(KEPT[kind], kind, layout) for kind in KINDS}
    busy = max(_vectors(BUSY_BACKWARD[kind], kind, layout) for kind in KINDS if job.depth(kind))
    if layout.recompute:
        inputs = 1 / layout.tp if layout.sequence_parallel else 1.0
        total = sum(job.depth(kind) for kind in KINDS) * inputs
        total += max(kept[kind] for kind in KINDS if job.depth(kind))
    else:
        total = sum(job.depth(kind) * kept[kind] for kind in KINDS)
    return Memory(weights, _states(layout, job), buffers, total * unit, busy * unit, 0.0)


def _vectors(passes: Passes, kind: Kind, layout: Layout) -> float:
    """Vectors of E features for each token of the context-parallel rank."""
    whole = float(passes.whole)
    if layout.sequence_parallel:
        gathered = min(GATHERED[kind], passes.whole)
        whole = gathered + (passes.whole - gathered) / layout.tp
    return passes.split / layout.tp + whole


def local_parameters(layout: Layout, job: Job) -> int:
    """Parameters of one tensor-parallel rank before anything else is sharded."""
    blocks = sum(job.depth(kind) * job.local_parameters(kind, layout.tp) for kind in KINDS)
    return blocks + job.other_parameters


def _weights(layout: Layout, job: Job) -> tuple[float, float]:
    """Bytes of the weights that lie on the GPU, and of those gathered meanwhile."""
    whole = local_parameters(layout, job) * job.weight_bytes
    if layout.zero < 3:
        return whole, 0.0
    # the block at work and the next one
    gathered = 2 * max(job.local_parameters(kind, layout.tp) for kind in KINDS) * job.weight_bytes
    stay = 0.0 if layout.offload or job.training else whole / layout.data
    return stay, min(gathered, whole)


def _states(layout: Layout, job: Job) -> float:
    parameters = local_parameters(layout, job)
    shards = layout.data
    optimiser = parameters * OPTIMISER_BYTES / (shards if layout.zero >= 1 else 1)
    gradients = parameters * GRADIENT_BYTES / (shards if layout.zero >= 2 else 1)
    # until they are reduced, those of a block are whole
    block = max(job.local_parameters(kind, layout.tp) for kind in KINDS) * GRADIENT_BYTES
    if layout.zero >= 2:
        gradients += block
    return block if layout.offload else optimiser + gradients
