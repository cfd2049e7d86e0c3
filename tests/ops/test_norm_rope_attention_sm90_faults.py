"""A test of the tests: the emulated Hopper must notice what is wrong where queries are prepared."""

from pathlib import Path

import pytest
import torch

from hunyuan_fast.kernels.qk_norm_rope import reference
from tests.kit import hopper
from tests.kit.emulation import plain_attention
from tests.ops.qk_norm_rope_cases import draw_call
from tests.ops.test_norm_rope_attention_sm90 import RawEmulator

ROOM = "rope3d_attention"
LAYOUT, FETCH = f"{ROOM}/sm90_layout.h", f"{ROOM}/sm90_fetch.cuh"
QUERIES, FORWARD = f"{ROOM}/sm90_queries.cuh", f"{ROOM}/sm90_forward.cuh"
# name: file, what stands there, what stands there instead
FAULTS = {
    "text is turned": (QUERIES, "turned = row < raw.rotated;", "turned = true;"),
    "turned the other way": (QUERIES, "even * cos - odd * sin", "even * cos + odd * sin"),
    "one weight for both streams": (QUERIES, "raw.stream[row >= raw.second]", "raw.stream[0]"),
    "text of another row": (QUERIES, "second ? row - raw.second : row", "row"),
    "features of another head": (QUERIES, "uint32_t(item.n * S::kFeatures", "uint32_t(0"),
    "half a row is normalised": (QUERIES, "step = 1; step <", "step = 2; step <"),
    "no epsilon": (QUERIES, " + raw.eps", ""),
    "rows past the end": (QUERIES, "next < end && next < valid", "next < end"),
    "a buffer still read": (
        QUERIES,
        "sm90::wait(shared.queries_empty(buffer.index), buffer.phase ^ 1);",
        "",
    ),
    "no fence": (QUERIES, "sm90::fence_async_proxy();  // written", ";  // written"),
    "one warp speaks for three": (FETCH, "S::kRaw ? kPreparers : 1", "1"),
    "two buffers for three": (LAYOUT, "filled_before / S::kQueryBuffers", "filled_before / 2"),
}
EVERY_SHAPE = "    p.D == 64 ? run_raw_tile"
ONE_SHAPE = (
    "    if constexpr (!std::is_same_v<T, __half>) "
    "run_shape<T, Shape<64, 176, 2, true>>(p, raw, stream);\n"
)

pytestmark = pytest.mark.skipif(hopper.compiler() is None, reason="no C++ compiler")


def is_alarmed(headers: Path, generator: torch.Generator) -> bool:
    """Whether one of a few calls stops, or is far from the truth."""
    emulator = RawEmulator(headers)
    emulator.processors = 2
    shape = {"batch": 2, "video": 150, "text": 230, "heads": 2, "head_dim": 64, "streams": 2}
    call = draw_call(generator, **shape, dtype=torch.bfloat16, eps=0.5)
    lengths = [352, 380]  # the first has no tail, whose fence would do for the queries too
    heads = reference.forward(*call.arguments)
    exact, _ = plain_attention(*(x.double() for x in heads), lengths, 0.5)
    _, k, v = heads
    text, text_weight = call.text[:2]
    weights = call.weights[0].float(), text_weight.float()
    raw = call.qkv, weights[0], *call.tables, text, weights[1], call.eps
    for emulator.seed in (0, 1, 5):
        out, lse = torch.empty_like(k), torch.empty(2, 2, 380)
        try:
            emulator.rope3d_attention_forward_raw_hopper(
                *raw, k, v, torch.tensor(lengths), 0.5, out, lse, 2, 0
            )
        except hopper.HopperFault:
            return True
        if not (out - exact).abs().max() < 0.03:
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
