"""What the benchmark files describe: every op, its cases, the work in them."""

import pytest
import torch

from benchmarks import shapes
from benchmarks.bench_fused_modulation import _case as modulation_case
from benchmarks.bench_rope3d_attention import _work as attention_work
from benchmarks.kit.case import EVERY_PASS, FORWARD, TRAINING, outputs
from benchmarks.kit.discover import WHOLES, load, ops
from hunyuan_fast import dispatch

CPU = torch.device("cpu")


def inference_only(op: str) -> bool:
    return op in dispatch.ops() and hasattr(
        dispatch.implementations(op)["reference"], "INFERENCE_ONLY"
    )


def test_every_op_has_a_benchmark_and_every_other_benchmark_is_named_a_whole():
    assert sorted(ops()) == sorted([*dispatch.ops(), *WHOLES])


def test_files_are_discovered_by_name_alone(tmp_path):
    for name in ("bench_b.py", "bench_a_b.py", "shapes.py", "bench_c.txt"):
        (tmp_path / name).touch()
    assert ops(tmp_path) == ("a_b", "b")


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "thorough"])
@pytest.mark.parametrize("op", ops())
def test_cases_are_told_apart_and_name_their_work(op, quick):
    cases = load(op).cases(CPU, quick=quick)
    keys = [(c.function, c.name, c.dtype) for c in cases]
    assert cases and len(set(keys)) == len(keys)
    trained = any(TRAINING in case.work for case in cases)
    assert trained or op == "vae" or inference_only(op)
    for case in cases:
        assert case.work and set(case.work) <= set(EVERY_PASS)
        assert FORWARD in case.work or op in WHOLES
        assert all(work.num_bytes > 0 for work in case.work.values())
        if {FORWARD, TRAINING} <= case.work.keys():  # else its calls are those of inference
            assert case.work[FORWARD].num_bytes < case.work[TRAINING].num_bytes
        if op in dispatch.ops():
            assert any(peer.name == "eager" or peer.name.startswith("sdpa") for peer in case.peers)
        assert len({peer.name for peer in case.peers}) == len(case.peers)


@pytest.mark.parametrize("op", dispatch.ops())
def test_a_quick_case_draws_what_the_op_takes(op):
    for case in load(op).cases(CPU, quick=True):
        inputs = case.inputs(torch.Generator().manual_seed(0))
        again = case.inputs(torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))
        # beside sums and numbers, which are wide
        dtypes = {case.dtype, *((torch.float32,) if op == "ring_attention" else ())}
        assert case.dtype in {x.dtype for x in inputs} <= dtypes
        assert any(x.requires_grad for x in inputs) != inference_only(op)
        assert list(inputs[0].shape) == list(case.shape.values())
        assert None in dispatch.explain(op, *case.arguments(*inputs)).values()
        with torch.no_grad():
            results = outputs(case.call(*inputs))
        assert {x.dtype for x in results} <= dtypes
        assert all(len(x) == len(inputs[0]) for x in results)


@pytest.mark.gpu
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "thorough"])
@pytest.mark.parametrize("op", ops())
def test_a_gpu_has_cases_of_its_own(op, quick):
    assert load(op).cases(torch.device("cuda"), quick=quick)


def test_named_shapes_are_those_of_the_real_models():
    assert shapes.CLIP_720P_129.grid == (33, 45, 80)
    assert shapes.CLIP_720P_129.video == 118_800
    assert shapes.CLIP_720P_129.joint == 119_056
    assert shapes.CLIP_256P_33.video == 2_304
    assert shapes.CLIP_256P_65.video == 4_352
    assert shapes.NANO.grid == (5, 6, 6)
    assert shapes.NUM_HEADS * shapes.HEAD_DIM == shapes.HIDDEN_SIZE
    assert sum(shapes.ROPE_DIMS) == shapes.HEAD_DIM
    assert sum(shapes.NANO_ROPE_DIMS) == shapes.NANO_HEAD_DIM


def test_modulation_moves_two_tensors_forward_and_three_backward():
    case = modulation_case("720p", shapes.CLIP_720P_129.joint, 3072, torch.bfloat16)
    tensor = 119_056 * 3072 * 2
    assert case.work[FORWARD].num_bytes == pytest.approx(2 * tensor, rel=1e-4)
    assert case.work[TRAINING].num_bytes == pytest.approx(5 * tensor, rel=1e-4)
    assert case.work[FORWARD].num_flops == 0


def test_attention_counts_the_products_of_valid_tokens_only():
    length = shapes.CLIP_720P_129.joint
    work = attention_work([length], 24, 128, torch.bfloat16)
    assert work[FORWARD].num_flops == pytest.approx(174.2e12, rel=1e-3)
    assert work[TRAINING].num_flops == pytest.approx(3.5 * 174.2e12, rel=1e-3)
    padded = attention_work([3, 5], 1, 8, torch.float32)
    assert padded[FORWARD].num_flops == 4 * 8 * (9 + 25)
    assert padded[FORWARD].num_bytes == 4 * (3 + 5) * 8 * 4
