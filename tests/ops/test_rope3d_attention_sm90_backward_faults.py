"""A test of the tests: the emulated Hopper must notice what is wrong in attention's gradients."""

from pathlib import Path

import pytest
import torch

from tests.kit import hopper
from tests.ops.test_rope3d_attention_sm90_backward import Call, Emulator

ROOM = "rope3d_attention"
KERNEL, LAYOUT = f"{ROOM}/sm90_backward.cuh", f"{ROOM}/sm90_backward.h"
MOVERS = f"{ROOM}/sm90_backward_movers.cuh"
EDGES = f"{ROOM}/sm90_backward_edges.cuh"
EVERY_SHAPE = "p.D == 64 ? run_backward_of<T, 64>(p, stream) : run_backward_of<T, 128>(p, stream);"
ONE_SHAPE = "run_backward_of<__nv_bfloat16, 128>(p, stream);\n"
# name: file, what stands there, what stands there instead
FAULTS = {
    "padding is read": (MOVERS, "if (first + rows > valid) {", "if (false) {"),
    "edges are not swizzled": (
        EDGES,
        "sm90::chunk_offset(row, chunk % sm90::kRowChunks)",
        "row * 128 + chunk % 8 * 16",
    ),
    "keys that are not there count": (
        KERNEL,
        "< keys ? scores[k][i] : 0",
        "< 64 ? scores[k][i] : 0",
    ),
    "gradients of padding are left": (
        EDGES,
        "row >= valid && row < rows",
        "row > valid && row < rows",
    ),
    "gradients past the end": (KERNEL, "if (key < block.valid) {", "if (true) {"),
    "natural logarithms": (EDGES, "known * kLog2E", "known"),
    "dk without its scale": (KERNEL, "write(dk, p.dk, p.scale)", "write(dk, p.dk, 1.0f)"),
    "half of the features of dout": (
        KERNEL,
        "descriptor_mn(queries, Tile::kQueryBlock)",
        "descriptor_mn(queries, 0)",
    ),
    "no fence before dS is read": (
        KERNEL,
        "sm90::fence_async_proxy();\n        arrive(block.scores_full",
        "arrive(block.scores_full",
    ),
    "no fence before dq leaves": (
        KERNEL,
        "sm90::fence_async_proxy();\n        arrive(block.sums_full",
        "arrive(block.sums_full",
    ),
    "dS over one that is still read": (
        KERNEL,
        "sm90::wait(block.scores_free(stage_of(tile)), phase_of(tile + 1) ^ 1);",
        "",
    ),
    "dS of the other consumer too early": (
        KERNEL,
        "sm90::wait(block.scores_full(stage), phase_of(tile + 1));",
        "",
    ),
    "dS is never given back": (KERNEL, "arrive(block.scores_free(stage_of(tile - 1)));", ""),
    "queries given back too early": (
        KERNEL,
        "sm90::wait_for_products<1>();\n        arrive(block.stage_free(stage));",
        "arrive(block.stage_free(stage));",
    ),
    "dq before it is there": (KERNEL, "sm90::wait_for_products<More ? 1 : 0>();", ""),
    "P before scores are there": (
        KERNEL,
        "sm90::wait_for_products<1>();\n        sm90::settle(s);",
        "sm90::settle(s);",
    ),
    "dq over one that has not left": (
        KERNEL,
        "sm90::wait(block.sums_free(consumer), tile % 2 ^ 1);",
        "",
    ),
    "the next one's turn too early": (MOVERS, "sm90::wait_for_stores<0>();\n", ""),
    "blocks by their index": (
        KERNEL,
        "sm90::take_ticket(reinterpret_cast<int*>(space + w.ticket))",
        "int(blockIdx.x)",
    ),
    "keys in another order": (LAYOUT, "place / here}", "key_tiles - 1 - place / here}"),
    "turns of another step": (MOVERS, "wait_for_turn(turns + tile,", "wait_for_turn(turns,"),
    "dq of the last step is kept": (KERNEL, "hand_over(dq, tiles - 1);", ""),
    "all keys of dk by one consumer": (
        KERNEL,
        "int const own = consumer * sm90::kBlockRows + 16 * warp;",
        "int const own = 16 * warp;",
    ),
    "sums begin with what was there": (EDGES, "sums[i] = Sixteen{};", "(void)sums;"),
}

pytestmark = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


def is_alarmed(headers: Path, generator: torch.Generator) -> bool:
    """Whether one of a few calls stops, or is far from the truth."""
    emulator = Emulator(headers)
    call = Call(generator, 290, [290, 0, 256, 70], 128, heads=1)
    low = Call(generator, 90, [77], 128, heads=1)
    low.make_scores_low()
    for of, emulator.seed in ((low, 4), (call, 0), (call, 1), (call, 5), (call, 6)):
        arguments = of.arguments()
        q = arguments[3]
        gradients = [torch.empty_like(q) for _ in range(3)]
        workspace = torch.empty(
            emulator.rope3d_attention_backward_workspace_hopper(q), dtype=torch.uint8
        )
        try:
            emulator.rope3d_attention_backward_hopper(*arguments, *gradients, workspace, 0)
        except hopper.HopperFault:
            return True
        if not all(x.isfinite().all() for x in gradients):
            return True
        if of is call:
            try:
                of.assert_right(tuple(gradients))
            except AssertionError:
                return True
    return False


def test_the_kernel_as_it_is_raises_no_alarm(tmp_path, generator):
    assert not is_alarmed(hopper.one_kernel(tmp_path, KERNEL, EVERY_SHAPE, ONE_SHAPE), generator)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, tmp_path, generator):
    file, right, wrong = FAULTS[fault]
    headers = hopper.one_kernel(tmp_path, KERNEL, EVERY_SHAPE, ONE_SHAPE)
    text = (headers / file).read_text()
    assert text.count(right) == 1
    (headers / file).write_text(text.replace(right, wrong))
    assert is_alarmed(headers, generator)
