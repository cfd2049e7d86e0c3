"""Small kernels that each try one thing of Hopper: on the emulated machine, and on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.kit import gpu, hopper
from tests.kit.native import ROOT

NATIVE = Path(__file__).parent / "native"
SEEDS = (*hopper.EXTREMES, 4)

needs_a_compiler = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels() -> hopper.Kernels:
    return hopper.build(NATIVE / "hopper_probes.cpp")


def swizzled(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (..., 32, 64) of 16-bit values in the order of shared memory."""
    rows, chunks = torch.arange(32)[:, None], torch.arange(8)
    return tiles.unflatten(-1, (8, 8))[..., rows, chunks ^ rows % 8, :].flatten(-2)


@needs_a_compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_share_tiles(kernels: hopper.Kernels, seed: int) -> None:
    rows, heads = 40, 3
    source = torch.randn(rows, heads, 64).bfloat16()
    found = torch.full((2, 4, heads, 32, 64), torch.nan, dtype=torch.bfloat16)
    kernels.run("share", source, found, rows, heads, 4 * heads, seed=seed)
    padded = torch.cat([source, torch.zeros(128 - rows, heads, 64).bfloat16()])
    expected = swizzled(padded.unflatten(0, (4, 32)).transpose(1, 2))
    assert torch.equal(found, expected.expand_as(found))


@needs_a_compiler
@pytest.mark.parametrize("registers", [False, True])
def test_products_of_bytes(kernels: hopper.Kernels, registers: bool) -> None:
    values = torch.randint(-3, 4, (64, 128)).float()
    a, b = values.to(torch.float8_e4m3fn), torch.randint(-3, 4, (128, 128)).to(torch.float8_e4m3fn)
    d = torch.full((64, 128), torch.nan)
    kernels.run("multiply_bytes", a, b, values if registers else None, d)
    assert torch.equal(d, values @ b.float().T)


@needs_a_compiler
@pytest.mark.parametrize("valid", [1, 37, 64])
def test_tails_are_zeros(kernels: hopper.Kernels, valid: int) -> None:
    a, b = torch.randn(2, valid, 64).bfloat16()
    d = torch.full((64, 64), torch.nan)
    kernels.run("multiply_tails", a.contiguous(), b.contiguous(), d, valid)
    expected = torch.zeros(64, 64)
    expected[:valid, :valid] = a.float() @ b.float().T
    torch.testing.assert_close(d, expected, rtol=0, atol=1e-4)


@needs_a_compiler
def test_blocks_add_in_turns(kernels: hopper.Kernels) -> None:
    sums, counters = torch.zeros(4, 256), torch.zeros(5, dtype=torch.int32)
    kernels.run("add_in_turns", sums, counters, 20)
    place, number = torch.arange(4)[:, None], torch.arange(256)
    expected = torch.zeros(4, 256)
    for ticket in range(20):
        share = (ticket * 7919 + place * 613 + number * 31) % 2003 - 1001
        expected += share.float() * 0.1
    assert torch.equal(sums, expected)
    assert counters.tolist() == [20] * 5


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    if not gpu.is_hopper():
        pytest.skip("needs an sm_90 GPU")
    gpu.run_program(tmp_path, NATIVE / "sm90_probes.cu", ROOT / "csrc/common/sm90_tensor_map.cu")
