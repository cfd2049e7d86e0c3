"""The emulated Hopper: right kernels run on it, each planted fault stops it, and words say why."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kit import hopper
from tests.kit.numerics import assert_as_good_as

pytestmark = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")

DRIVERS = Path(__file__).parent / "native"
FORMS = ("both along K", "B along N", "A along M", "A from registers", "bytes")
SEEDS = (*hopper.EXTREMES, 4, 5)

# In the driver's order: what is wrong, in which form, and what a report must say.
FAULTS = {
    "no wait for sums": (0, "a race at byte .* a product of warpgroup 1 reads"),
    "wrong parity": (0, "deadlock|still under way|no wait or barrier says"),
    "no wait for empty stages": (0, "more threads arrive|a race at byte .* the copies to barrier"),
    "atoms too far apart": (0, "wrong sums"),
    "too few bytes announced": (0, "more bytes have come than were announced"),
    "too many bytes announced": (0, "deadlock(.|\n)*16 bytes are missing"),
    "no proxy fence": (0, "no fence_async_proxy lies on the way"),
    "a stage given back before the wait": (0, "a race at byte .* a product of warpgroup 1 reads"),
    "no fence before products": (0, "has not called fence_products"),
    "registers of A overwritten": (3, "registers of operand A changed"),
    "blocks of N too close": (1, "wrong sums"),
    "no wait for a store": (0, "no wait says that a store has read"),
    "barriers not fenced": (0, "the barrier of a copy: .* no fence_async_proxy"),
    "a named barrier of too many": (0, "named barrier 1 \\(128 of 160 threads are there\\)"),
    "too many registers": (0, "deadlock(.|\n)*registers|deadlock(.|\n)*4 of 4 arrivals"),
    "beyond a tensor": (0, "touches .* from the beginning of the nearest tensor, of 256"),
    "sums touched before the wait": (0, "wrote sums before the wait"),
    "beyond shared memory": (0, "bytes \\+147456 to \\+147464 of shared memory"),
    "a tile between atoms": (0, "is not a multiple of 1024"),
    "a lane that left": (0, "which has left the kernel"),
    "plain stores not fenced": (0, "written by plain stores, and no fence_async_proxy"),
    "read before it came": (0, "still under way|a race at byte|deadlock|wrong sums"),
}
PLAIN_STORES = ("beyond a tensor", "plain stores not fenced")
CLUSTER_FAULTS = {
    "used before all have begun": "the barrier of a copy: a race|there is no barrier",
    "left before all are done": "has ended|may end before thread 32 has reached",
    "one block told of two": "a race at byte|still under way",
    "copied to one block": "deadlock",
    "lanes that lag by a phase": "deadlock",
    "half of the bytes announced": "a race at byte|still under way",
    "a stage not given back": "deadlock(.|\n)*2 of 2 arrivals",
}
# Who lags is drawn: it need not happen.
NOT_ALWAYS = ("lanes that lag by a phase",)


@pytest.fixture(scope="module")
def kernels() -> hopper.Kernels:
    return hopper.build(DRIVERS / "hopper_gemm.cpp")


def draw(form: int, rows: int, columns: int, depth: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float8_e4m3fn if form == 4 else torch.bfloat16
    return torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)


def multiply(
    kernels: hopper.Kernels,
    a: Tensor,
    b: Tensor,
    *,
    form: int,
    fault: int = 0,
    seed: int = 0,
    scale: Tensor | None = None,
) -> Tensor:
    """a @ b.T, in bf16; by sums in fp32 where there is a scale of rows."""
    (M, K), N = a.shape, len(b)
    y = sums = None
    if scale is None:
        y = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
    else:
        sums = torch.zeros(-(-M // 64), -(-N // 128), 64, 128)
    a = a.T.contiguous() if form == 2 else a
    b = b.T.contiguous() if form == 1 else b
    kernels.run("gemm", a, b, y, sums, scale, M, N, K, form, fault, seed=seed)
    if y is not None:
        return y
    return sums.transpose(1, 2).flatten(2).flatten(0, 1)[:M, :N]


@pytest.mark.parametrize("form", range(len(FORMS)), ids=FORMS)
def test_sums_are_right_at_every_timing(kernels: hopper.Kernels, form: int) -> None:
    a, b = draw(form, 96, 200, 208)
    truth = a.double() @ b.double().T
    plain = (a.float() @ b.float().T).bfloat16()
    for seed in SEEDS:
        y = multiply(kernels, a, b, form=form, seed=seed)
        assert_as_good_as(y, truth, plain, plain)
        sums = multiply(kernels, a, b, form=form, seed=seed, scale=torch.ones(64))
        torch.testing.assert_close(sums.double(), truth, rtol=0, atol=1e-4)


def test_bulk_sums_flush_what_is_too_small(kernels: hopper.Kernels) -> None:
    a, b = draw(0, 64, 128, 64)
    assert (multiply(kernels, a, b, form=0, scale=torch.full((64,), 1e-41)) == 0).all()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(kernels: hopper.Kernels, name: str) -> None:
    fault = list(FAULTS).index(name) + 1
    form, words = FAULTS[name]
    a, b = draw(form, 96, 200, 256)
    truth = a.double() @ b.double().T
    for seed in SEEDS:
        with pytest.raises(AssertionError, match=words):
            scale = torch.ones(64) if name in PLAIN_STORES else None
            y = multiply(kernels, a, b, form=form, fault=fault, seed=seed, scale=scale)
            assert (y.double() - truth).abs().max() < 1, "wrong sums"


def test_a_fault_leaves_nothing_behind(kernels: hopper.Kernels) -> None:
    a, b = draw(0, 64, 128, 64)
    with pytest.raises(hopper.HopperFault):
        multiply(kernels, a, b, form=0, fault=6)
    y = multiply(kernels, a, b, form=0)
    torch.testing.assert_close(y.double(), a.double() @ b.double().T, rtol=0.01, atol=0.01)


@pytest.fixture(scope="module")
def cluster() -> hopper.Kernels:
    return hopper.build(DRIVERS / "hopper_cluster.cpp")


def share(cluster: hopper.Kernels, x: Tensor, seed: int, fault: int = 0) -> Tensor:
    """Through the shared memory of two blocks, to each of two results."""
    y = torch.full((2, *x.shape), torch.nan, dtype=x.dtype)
    cluster.run("share", x, y, len(x), fault, seed=seed)
    return y


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_share(cluster: hopper.Kernels, seed: int) -> None:
    x = torch.randn(5, 64, 64).bfloat16()
    assert torch.equal(share(cluster, x, seed), torch.stack([x, x]))


@pytest.mark.parametrize("name", CLUSTER_FAULTS)
def test_faults_of_clusters_are_caught(cluster: hopper.Kernels, name: str) -> None:
    x = torch.randn(5, 64, 64).bfloat16()
    caught = []
    for seed in SEEDS:
        try:
            share(cluster, x, seed, fault=list(CLUSTER_FAULTS).index(name) + 1)
        except hopper.HopperFault as fault:
            assert re.search(CLUSTER_FAULTS[name], str(fault))
            caught.append(seed)
    assert caught if name in NOT_ALWAYS else len(caught) == len(SEEDS)
