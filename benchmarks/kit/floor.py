"""The floor under a measurement: what this machine can do at best, timed in the same rounds.

Memory: a copy that moves as many bytes as the op must. Arithmetic: a matrix product in the dtype of
the case, or a 3D convolution where the case asks for one and it is faster. Being contenders like
the others, they feel the same neighbours and the same clock rate.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.kit.case import Case, Work
from benchmarks.kit.clock import Run
from benchmarks.kit.pairing import Entry

COPY, MATMUL, CONV3D = "copy", "matmul", "conv3d"
MEMORY, COMPUTE = "memory", "compute"
# Large enough for the best rate, small enough for a round.
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
# A copy of more bytes is no faster, and takes the memory of those who are measured.
_MOST_COPIED = 4 * 2**30


@dataclass(frozen=True)
class Probe:
    """A call and the work in it: bytes of a copy, FLOPs of a matrix product."""

    entry: Entry
    amount: float


def floor_probes(case: Case, work: Work, device: torch.device, copies: int) -> dict[str, Probe]:
    """Warm probes for a case; the copy goes through as many buffers as the case has inputs."""
    probes = {COPY: _copy(work.num_bytes, device, copies)}
    if work.num_flops:
        probes[MATMUL] = _matmul(case.dtype, device)
    if case.conv3d:
        probes[CONV3D] = _conv3d(case.conv3d, case.dtype, device)
    for probe in probes.values():
        probe.entry.run()
    return probes


def floors(
    probes: Mapping[str, Probe], seconds: Mapping[str, Sequence[float]], work: Work
) -> tuple[list[float], str]:
    """The floor of every round in seconds, and whether memory or compute sets most of them."""
    memory = [each * work.num_bytes / probes[COPY].amount for each in seconds[COPY]]
    if MATMUL not in probes:
        return memory, MEMORY
    # Where a convolution was timed as well, the faster of the two says what can be done.
    known = [name for name in (MATMUL, CONV3D) if name in probes]
    per_flop = ([each / probes[name].amount for each in seconds[name]] for name in known)
    compute = [min(each) * work.num_flops for each in zip(*per_flop, strict=True)]
    higher = [max(pair) for pair in zip(memory, compute, strict=True)]
    return higher, COMPUTE if sum(compute) > sum(memory) else MEMORY


def _copy(num_bytes: int, device: torch.device, copies: int) -> Probe:
    size = max(1, min(num_bytes, _MOST_COPIED) // 2)
    # Touched now: the first write to a fresh page is not what a copy costs.
    pairs = [
        [torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2)]
        for _ in range(copies)
    ]
    turns = itertools.cycle(pairs)

    def run() -> None:
        source, target = next(turns)
        target.copy_(source)

    return Probe(Entry(run), 2 * size)


def _matmul(dtype: torch.dtype, device: torch.device) -> Probe:
    n = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    run: Run = lambda: torch.mm(a, b, out=out)  # noqa: E731
    return Probe(Entry(run), 2 * n**3)


def _conv3d(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Probe:
    """What the library's convolutions reach, in the layout they like."""
    channels, *places = size
    x = torch.randn(1, *size, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, 3, device=device).to(dtype)
    layout = torch.channels_last_3d
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    run: Run = lambda: torch.nn.functional.conv3d(x, weight)  # noqa: E731
    return Probe(Entry(run), 2 * 27 * channels**2 * math.prod(n - 2 for n in places))
