"""Faults planted in the sources of the Hopper kernel are seen, by the machine or by the rules."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hunyuan_fast.kernels.fp8_attention import reference
from tests.kit import hopper
from tests.kit.native import ROOT
from tests.ops.fp8_attention_cases import E4M3, Call, draw_call, judge, statistics

pytestmark = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")

DRIVER = ROOT / "tests/native/hopper_fp8_attention.cpp"
KERNEL, LAYOUT, FETCH = (f"sm90_{name}" for name in ("forward.cuh", "layout.h", "fetch.cuh"))
# What is replaced in which file.
FAULTS = {
    "probabilities in another order": (
        LAYOUT,
        "8 * (r / 2) + 4 * (i / 2)",
        "4 * (r / 2) + 8 * (i / 2)",
    ),
    "the last tile is not masked": (KERNEL, "if (in_last < kKeys) mask", "if (false) mask"),
    "the scale of another tile": (KERNEL, "k_scale[tile_of(step, tiles)]", "k_scale[step]"),
    "the correction of the next tile": (
        *(
            KERNEL,
            "        add(sums, correction, part);",
            "        add(sums, next_correction, part);",
        ),
    ),
    "parts pile up": (
        KERNEL,
        "descriptor_step(k), k > 0);\n    }",
        "descriptor_step(k), 1);\n    }",
    ),
    "scores read before they are there": (KERNEL, "wait_for_products<1>", "wait_for_products<2>"),
    "values given back while they are read": (
        KERNEL,
        """        sm90::wait_for_products<0>();
        sm90::settle(part);
        if (lane == 0) sm90::arrive(shared.values_empty(values.stage));
""",
        """        if (lane == 0) sm90::arrive(shared.values_empty(values.stage));
        sm90::wait_for_products<0>();
        sm90::settle(part);
""",
    ),
    "queries fetched over those in use": (
        *(FETCH, "sm90::wait(shared.queries_empty(consumer), parity ^ 1);", ""),
    ),
}


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    generator = torch.Generator().manual_seed(7)
    options = {"heads": 1, "head_dim": 128, "bias": 0.5, "outliers": 4.0}
    return [
        draw_call(generator, length=700, lengths=(641,), **options),
        draw_call(generator, length=140, lengths=(130, 5), **options),
    ]


def outcomes(kernels: hopper.Kernels, calls: list[Call]) -> Iterator[None]:
    """Runs with work late and early, on one processor; raises what the first bad one raises."""
    for call in calls:
        codes = reference.quantize(*call.arguments, statistics(call))
        tensors = [x.view(torch.uint8) if x.dtype == E4M3 else x for x in codes]
        for seed in hopper.EXTREMES:
            out = torch.empty_like(call.q)
            numbers = [*out.shape[:3], codes.q.shape[2], 2, False, 1, *out.stride()[:3]]
            arguments = (*tensors, call.kv_len, out, numbers)
            kernels.run("fp8_attention_forward", *arguments, seed=seed, processors=1)
            yield judge("the kernel", out, call)


def test_the_kernel_itself_raises_no_alarm(calls):
    assert len(list(outcomes(hopper.build(DRIVER), calls))) == 8


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, calls, tmp_path):
    name, right, wrong = FAULTS[fault]
    for room in ("common", "fp8_attention"):
        shutil.copytree(ROOT / "csrc" / room, tmp_path / room)
    source = Path(tmp_path, "fp8_attention", name)
    assert source.read_text().count(right) == 1, "the place is not unique any more"
    source.write_text(source.read_text().replace(right, wrong))
    with pytest.raises(AssertionError):
        list(outcomes(hopper.build(DRIVER, tmp_path), calls))
