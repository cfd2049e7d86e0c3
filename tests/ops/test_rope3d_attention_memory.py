"""What the C++ attention has beside tensors: counted, and seen by the system, next to torch's."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kit import resident
from benchmarks.kit.clock import MIB
from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import attention

ROOM = "rope3d_attention"
ROOT = Path(__file__).parents[2]
LENGTH, THREADS = 4608, 2
LENGTHS = (4392, LENGTH)
SHAPE = (2, LENGTH, 8, 128)
# They take the same, apart from the log-sum-exp, and less time.
FEW_HEADS = (2, LENGTH, 2, 128)
# What the record of resident memory is off by: counters of threads, Python's own memory.
SLACK_MIB = 0.3
needs_resident = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of resident memory"
)


@pytest.fixture
def native():
    if "cpu_impl" not in implementations(ROOM):
        pytest.skip("the native module is not built")
    return implementations(ROOM)["cpu_impl"]._C


def counted(native, dtype=torch.bfloat16, shape=SHAPE, lengths=LENGTHS, threads=THREADS):
    """MiB of forward and backward."""
    q = torch.empty(1, dtype=dtype).expand(shape)
    kv_len = None if lengths is None else torch.tensor(lengths)
    return [x / MIB for x in native.rope3d_attention_bytes_cpu(q, kv_len, threads)]


def multiplies_pairs(native) -> bool:
    """Whether tiles hold bfloat16, and not fp32 made of it."""
    return counted(native)[0] < counted(native, torch.float32)[0]


def test_what_is_counted(native):
    forward, backward = counted(native)
    single = counted(native, torch.float32)
    if multiplies_pairs(native):
        assert forward <= 0.75
        assert backward <= 3.6
    assert max(forward, single[0]) <= 1.0
    assert single[1] <= 2.0
    # of dq in 16 bits the lower halves of the sums are kept, those of a head for each thread
    assert backward <= single[1] + THREADS * LENGTH * 128 * 2 / MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_grows_with_threads_and_not_with_heads_or_samples(native, dtype):
    per_thread = [counted(native, dtype, threads=n) for n in (1, 2, 3, 4)]
    for fewer, more in pairwise(per_thread):
        assert more[0] - fewer[0] <= 0.5
        assert more[1] - fewer[1] <= 2.2
    for shape in [(2, LENGTH, 24, 128), (7, LENGTH, 8, 128)]:
        assert counted(native, dtype, shape, None) == counted(native, dtype, SHAPE, None)


def test_threads_share_long_heads(native):
    """16 threads at 65,536 tokens: one lane of 16 MiB, where each of its own would need 256."""
    shape = (1, 1 << 16, 24, 128)
    rooms = counted(native, torch.float32, shape, None, 16)[1]
    assert counted(native, torch.bfloat16, shape, None, 16)[1] <= rooms + 17


def test_nothing_is_needed_for_nothing(native):
    assert counted(native, lengths=(0, 0))[1] == 0


@needs_resident
def test_what_the_system_sees(native):
    """Hardly more than what is counted; forward half of torch's, with backward no more."""
    forward, training = grown_elsewhere("ours")
    lse = 4 * FEW_HEADS[0] * FEW_HEADS[1] * FEW_HEADS[2] / MIB
    counts = counted(native, shape=FEW_HEADS)
    assert forward <= counts[0] + lse + SLACK_MIB
    assert training <= max(counts) + lse + SLACK_MIB
    if multiplies_pairs(native):
        others_forward, others_training = grown_elsewhere("torch")
        assert forward <= 0.5 * others_forward
        assert training <= others_training + SLACK_MIB


def grown_elsewhere(who: str) -> list[float]:
    """``grown`` in a process of its own, forward and with backward."""
    call = f"from {__name__} import grown; print(*(grown({who!r}, t) for t in (False, True)))"
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(each) for each in done.stdout.split()]


def grown(who: str, training: bool) -> float:
    """MiB of a later call beside its results, and the output that backward needs."""
    torch.set_num_threads(THREADS)
    q, k, v, dout = (torch.randn(FEW_HEADS).bfloat16() for _ in range(4))
    leaves = [x.requires_grad_(training) for x in (q, k, v)]
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(LENGTH) < lengths[:, None])[:, None, None, :]
    results: list[object] = []

    def call() -> None:
        with use("cpu_impl", ROOM), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = attention(*leaves, kv_len=lengths) if who == "ours" else _torch(*leaves, mask)
        results.append(torch.autograd.grad(out, leaves, dout) if training else out)

    resident.growth(call)  # what torch makes once, programs for its products, stays
    seen = []
    for _ in range(3):
        results.clear()
        grown_by = resident.growth(call)
        assert grown_by is not None
        seen.append(grown_by)
    # whatever else the process did meanwhile only adds to it
    return (min(seen) - (4 if training else 1) * q.nbytes) / MIB


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
