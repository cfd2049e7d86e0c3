"""What tests on a GPU share: how large, how often, graphs, programs.

A rehearsal (``pytest --rehearse-gpu``) goes the same ways at sizes that an interpreter bears. All
sizes that it cannot bear are asked for here.
"""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from tests.kit.native import ROOT, nvcc

T = TypeVar("T")
Results = Sequence[Tensor | None]

# Set before any test is collected, by the rehearsal.
rehearsed = False

# Runs that must give the same bits: of calls that take microseconds, and of those that take more.
MANY, FEW = 250, 20


def size(on_a_gpu: T, in_a_rehearsal: T) -> T:
    """The first; the second in a rehearsal."""
    return in_a_rehearsal if rehearsed else on_a_gpu


def rows_past_two_to_the_31(width: int) -> int:
    """So many rows that their elements are more than 2^31, and a few of them beyond it."""
    return size(2**31 // width + 9, 4)


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def same_bits(first: Results, second: Results) -> bool:
    """Whether results are the same to the last bit; NaN is one of many numbers here."""
    pairs = zip(first, second, strict=True)
    return all(a is b if a is None or b is None else _equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def assert_same_bits_at_every_run(call: Callable[[], Results], times: int = MANY) -> None:
    """Call it so often; races between blocks show as bits that differ now and then."""
    first = call()
    times = size(times, 1)
    different = [run for run in range(times) if not same_bits(call(), first)]
    assert not different, f"{len(different)} of {times} runs differ, the first is {different[0]}"


def assert_a_graph_replays(call: Callable[[], Results], inputs: Sequence[Tensor]) -> None:
    """A captured call computes anew at every replay, from what its inputs hold by then.

    ``inputs`` are changed: two of the same shape change places where there are, others are halved.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels load, and tables are made
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(size(2, 1)):
        with torch.no_grad():
            for x in inputs:
                x.mul_(0.5) if x.is_floating_point() else x.sub_(1).clamp_(min=0)
        expected = call()
        for result in (x for x in results if x is not None):
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(results, expected)


def run_program(folder: Path, *sources: Path) -> None:
    """Compile sources for Hopper, run them; the program says ``ok``, or what is wrong.

    A rehearsal only compiles them.
    """
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    program = folder / sources[0].stem
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
    subprocess.run([nvcc(), *flags, *sources, "-o", program], check=True)
    if rehearsed:
        return
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
