"""Tensor and sequence parallel against one process: values, gradients, faults, traffic."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import tensor_parallel_cases as cases
from tests.kit.numerics import assert_as_good_as
from tests.kit.ranks import RankPool

MODES = pytest.mark.parametrize("sequence_parallel", (False, True), ids=("tp", "tp+sp"))
WITH_CONTEXT = ({"tp": 2, "cp": 2}, {"tp": 2, "cp": 2, "ulysses": 2, "sequence_parallel": False})


def tensors(ranks: int, sequence_parallel: bool = True) -> dict[str, Any]:
    """A layout."""
    return {"tp": ranks, "sequence_parallel": sequence_parallel}


def check(results: list[dict[str, Any]], most: float) -> None:
    """Small differences, and the same bits of replicated gradients on all ranks.

    Those of gradients are in units of the largest one.
    """
    for rank, found in enumerate(results):
        assert found["output"] <= most, f"velocity on rank {rank}: {found['output']}"
        worst = max(found["gradient"], key=found["gradient"].get)
        assert found["gradient"][worst] <= most, f"{worst} on {rank}: {found['gradient'][worst]}"
        for name, gradient in found["replicated"].items():
            assert torch.equal(gradient, results[0]["replicated"][name]), f"{name} on rank {rank}"


@MODES
@pytest.mark.parametrize("ranks_of", (2, 3, 4))
def test_equals_one_process(ranks: RankPool, ranks_of: int, sequence_parallel: bool) -> None:
    layout = tensors(ranks_of, sequence_parallel)
    check(ranks.run(ranks_of, cases.compare, layout, torch.float32), 1e-5)


@MODES
def test_equals_one_process_in_float64(ranks: RankPool, sequence_parallel: bool) -> None:
    check(ranks.run(3, cases.compare, tensors(3, sequence_parallel), torch.float64), 1e-10)


@pytest.mark.parametrize("layout", WITH_CONTEXT, ids=str)
def test_with_context_parallel(ranks: RankPool, layout: dict[str, Any]) -> None:
    check(ranks.run(4, cases.compare, layout, torch.float64, True), 1e-10)


def test_gradient_checkpointing(ranks: RankPool) -> None:
    check(ranks.run(2, cases.compare, tensors(2), torch.float64, True), 1e-10)


@pytest.mark.parametrize("fault", cases.FAULTS)
def test_faults_are_noticed(ranks: RankPool, fault: str) -> None:
    found = ranks.run(2, cases.compare, tensors(2), torch.float64, False, fault, cases.CASES[:1])
    with pytest.raises(AssertionError):
        check(found, 1e-5)


def test_lengths_of_another_pass_are_noticed(ranks: RankPool) -> None:
    ranks.run(2, cases.lengths_of_another_pass)


def test_bf16_is_as_good_as_one_process(ranks: RankPool) -> None:
    model, dtype = cases.transformer().bfloat16(), torch.bfloat16
    plain, plain_gradients = cases.step(model, cases.CASES, dtype)
    exact, exact_gradients = cases.step(model.double(), cases.CASES, dtype, compute=torch.float64)
    for found in (
        ranks.run(ranks_of, cases.low_precision, tensors(ranks_of, divide))[-1]
        for ranks_of, divide in ((2, False), (4, True))
    ):
        for ours, truth, theirs in zip(found["velocities"], exact, plain, strict=True):
            assert_as_good_as(ours, truth, theirs)

        def held(gradients: dict[str, Tensor], cuts: Any = found["cuts"]) -> dict[str, Tensor]:
            return {n: cuts[n].take(x) if n in cuts else x for n, x in gradients.items()}

        truth = held(exact_gradients)
        ours, theirs = (
            distance(gradients, truth) for gradients in (found["gradients"], held(plain_gradients))
        )
        assert ours <= 2 * theirs


def distance(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root mean square over all tensors of the error of each, in units of its largest value."""
    errors = [
        (gradients[name].double() - truth).square().mean() / truth.abs().max().square()
        for name, truth in exact.items()
    ]
    return float(torch.stack(errors).mean().sqrt())


@pytest.mark.parametrize("ranks_of", (2, 3, 4))
def test_traffic(ranks: RankPool, ranks_of: int) -> None:
    doubles, singles = cases.SIZES["mm_double_blocks_depth"], cases.SIZES["mm_single_blocks_depth"]
    batch, width, head = 2, cases.SIZES["hidden_size"], 8
    video, text = 13, 7

    def summed(numbers: int) -> int:
        """Bytes that all ranks together send for a sum: each number goes round twice."""
        return ranks_of * (2 * (ranks_of - 1) * 4 * numbers // ranks_of)

    norms = (4 * doubles + 2 * singles) * summed(head)
    streams = 2 * doubles * (summed(batch * video * width) + summed(batch * text * width))
    layers = streams + singles * summed(batch * (video + text) * width)
    found = ranks.run(ranks_of, cases.traffic, tensors(ranks_of, False))
    assert sum(rank["forward"][0] for rank in found) == layers
    assert sum(rank["both"][0] for rank in found) == 2 * layers + norms
    for rank in found:
        forward = 4 * doubles + singles
        small = 4 * doubles + 2 * singles
        assert [rank["forward"][1], rank["both"][1]] == [forward, 2 * forward + small]

    # Divided tokens are gathered and scattered instead, and gathered where the blocks change and
    # end; in backward where they change and begin. Biases and modulations are summed as norms are.
    edges = summed(batch * (video + text) * width)
    biases = (4 * doubles + singles) * summed(width)
    modulations = 2 * doubles * summed(batch * 6 * width) + singles * summed(batch * 3 * width)
    found = ranks.run(ranks_of, cases.traffic, tensors(ranks_of))
    assert sum(rank["forward"][0] for rank in found) == layers + edges
    small_bytes = norms + biases + modulations
    assert sum(rank["both"][0] for rank in found) == 2 * (layers + edges) + small_bytes
    for rank in found:
        forward = 8 * doubles + 2 * singles + 3
        small = 10 * doubles + 4 * singles
        assert [rank["forward"][1], rank["both"][1]] == [forward, 2 * forward + small]


def test_divided_tokens_keep_less_for_backward(ranks: RankPool) -> None:
    whole, divided = (
        max(ranks.run(4, cases.kept_for_backward, tensors(4, divide))) for divide in (False, True)
    )
    # what layers read is gathered, and kept so; what lies between them is a quarter
    assert divided < 0.82 * whole, (divided, whole)


def test_variants(ranks: RankPool) -> None:
    for found in ranks.run(3, cases.variants, 3):
        assert max(found.values()) <= 1e-5, found


def test_refusals(ranks: RankPool) -> None:
    ranks.run(3, cases.refused, 3)
    assert all(ranks.run(2, cases.unchanged))
