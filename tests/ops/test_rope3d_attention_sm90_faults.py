"""A test of the tests: the emulated Hopper must notice what is wrong in the attention kernel."""

from pathlib import Path

import pytest
import torch

from tests.kit import hopper
from tests.kit.emulation import plain_attention
from tests.ops.test_rope3d_attention_sm90 import Emulator, draw

ROOM = "rope3d_attention"
MACHINE, LAYOUT = "common/sm90_layout.h", f"{ROOM}/sm90_layout.h"
FETCH, SOFTMAX = f"{ROOM}/sm90_fetch.cuh", f"{ROOM}/sm90_softmax.cuh"
FORWARD = f"{ROOM}/sm90_forward.cuh"
# name: file, what stands there, what stands there instead
FAULTS = {
    "features of values too near": (FORWARD, "values_at, S::kKeyBlockBytes", "values_at, 1024"),
    "values of half the keys": (MACHINE, "(kDepth * kRowBytes >> 4)", "(kDepth * kRowBytes >> 5)"),
    "pairs of probabilities swapped": (
        FORWARD,
        "scores[8 * k + 2 * i],",
        "scores[8 * k + 2 * (i ^ 1)],",
    ),
    "padding among the keys counts": (
        FORWARD,
        "if (tail) mask_columns(",
        "if (false) mask_columns(",
    ),
    "padding is read": (FETCH, "given = row < valid;", "given = true;"),
    "the tail comes last": (LAYOUT, "(step == 0 ? tiles - 1 : step - 1)", "(step)"),
    "one tail barrier for all stages": (FETCH, "4 * kStages + stage", "4 * kStages"),
    "no fence after a tail": (FORWARD, "sm90::fence_async_proxy();  // a tail", ";  // a tail"),
    "sums keep their scale": (FORWARD, "rescale(sums, correction);", ";"),
    "scores read before they are there": (FORWARD, "sm90::wait_for_products<1>();", ";"),
    "sums touched under a product": (
        FORWARD,
        "sm90::wait_for_products<0>();\n        sm90::settle(sums);",
        "",
    ),
    "a turn is kept": (FORWARD, "pass_turn(consumer);\n        sm90::wait", "sm90::wait"),
    "no turn at the beginning": (FORWARD, "if (consumer == 1) pass_turn(consumer);", ""),
    "queries too early": (
        FETCH,
        "sm90::wait(shared.queries_empty(consumer), parity ^ 1);",
        "",
    ),
    "keys too early": (FETCH, "keys.phase ^ 1);\n        if", "keys.phase);\n        if"),
    "both blocks fetch the same half": (FETCH, "first + rank * S::kFetchedKeys", "first"),
    "halves over each other": (FETCH, "+ rank * S::kFetchedBlockBytes", ""),
    "the other block is not asked": (
        FETCH,
        "sm90::arrive_remote(empty, lane)",
        "sm90::arrive(empty)",
    ),
    "blocks begin on their own": (
        FETCH,
        "        sm90::sync_cluster();",
        "        __syncthreads();",
    ),
    "largest of two threads": (SOFTMAX, "return fmaxf(x, __shfl_xor_sync(~0u, x, 2))", "return x"),
    "total of two threads": (SOFTMAX, "return x + __shfl_xor_sync(~0u, x, 2)", "return x"),
    "chunks of the output exchanged": (
        FORWARD,
        "high ? pairs[i] : pairs[i + 2], 2",
        "pairs[i + 2], 2",
    ),
    "rows of padding written": (FORWARD, "valid ? sm90::pack<T>(", "true ? sm90::pack<T>("),
    "log-sum-exp of powers of two": (FORWARD, "shift[which] / kLog2E", "shift[which]"),
}
EVERY_SHAPE, ONE_SHAPE = "    bool const wide", "    run_tile<T, 128, 128>(p, stream);\n"

pytestmark = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


def is_alarmed(headers: Path, generator: torch.Generator) -> bool:
    """Whether one of a few calls stops, or is far from the truth."""
    emulator = Emulator(headers)
    lengths, length, scale = [280, 0, 256, 1], 280, 128**-0.5
    q, k, v = draw(generator, lengths, length, 1, 128, torch.bfloat16)
    q *= 4
    exact, exact_lse = plain_attention(*(x.double() for x in (q, k, v)), lengths, scale)
    for cluster, emulator.seed in ((1, 4), (2, 0), (2, 1), (2, 5)):
        out, lse = torch.empty_like(q), torch.empty(4, 1, length)
        call = (q, k, v, torch.tensor(lengths), scale, out, lse, 128, cluster, 0)
        try:
            emulator.rope3d_attention_forward_hopper(*call)
        except hopper.HopperFault:
            return True
        finite = exact_lse.isfinite()
        if not ((out - exact).abs().max() < 0.02 and torch.equal(lse.isfinite(), finite)):
            return True
        if (lse - exact_lse)[finite].abs().max() > 2**-12:
            return True
    return False


def test_the_kernel_as_it_is_raises_no_alarm(tmp_path, generator):
    assert not is_alarmed(hopper.one_kernel(tmp_path, FORWARD, EVERY_SHAPE, ONE_SHAPE), generator)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, tmp_path, generator):
    file, right, wrong = FAULTS[fault]
    headers = hopper.one_kernel(tmp_path, FORWARD, EVERY_SHAPE, ONE_SHAPE)
    text = (headers / file).read_text()
    assert text.count(right) == 1
    (headers / file).write_text(text.replace(right, wrong))
    assert is_alarmed(headers, generator)
