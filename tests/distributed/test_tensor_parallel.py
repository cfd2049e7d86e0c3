"""Tensor and sequence parallel against one process: values, gradients, faults, traffic."""

from typing import Any

import pytest
import torch

from tests.distributed import tensor_parallel_cases as cases
from tests.kit.ranks import RankPool

MODES = pytest.mark.parametrize("sequence_parallel", (False, True), ids=("tp", "tp+sp"))
MOST = {torch.float32: 1e-5, torch.float64: 1e-10}


def check(results: list[dict[str, Any]], most: float) -> None:
    """Small differences, and the same bits of replicated gradients on all ranks."""
    for rank, found in enumerate(results):
        assert found["output"] <= most, f"velocity on rank {rank}: {found['output']}"
        worst = max(found["gradient"], key=found["gradient"].get)
        assert found["gradient"][worst] <= most, f"{worst} on {rank}: {found['gradient'][worst]}"
        for name, gradient in found["replicated"].items():
            assert torch.equal(gradient, results[0]["replicated"][name]), f"{name} on rank {rank}"


@MODES
@pytest.mark.parametrize("ranks_of", (2, 3, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("fp32", "fp64"))
def test_equals_one_process(
    ranks: RankPool, ranks_of: int, sequence_parallel: bool, dtype: torch.dtype
) -> None:
    check(ranks.run(ranks_of, cases.compare, ranks_of, sequence_parallel, dtype), MOST[dtype])
