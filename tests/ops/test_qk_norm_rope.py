"""Packed projections to joint heads: every implementation against the truth, on awkward memory."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hunyuan_fast.kernels.qk_norm_rope import config
from hunyuan_fast.ops import apply_rope3d
from tests.kit.inputs import FAMILIES, LAYOUTS, with_layout
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_equal
from tests.ops.qk_norm_rope_cases import (
    DTYPES,
    Call,
    answering_on_cpu,
    apply,
    assert_right,
    draw_call,
    plain,
    run,
)

# Where there is a GPU, Triton compiles its kernels and refuses tensors on the CPU.
ON_CPU = answering_on_cpu(os.environ.get("TRITON_INTERPRET") == "1")
FAST = [name for name in ON_CPU if name != "triton_impl"]
# Heads of every length modulo the vector widths; 128 is the model's, 64 the miniature's.
HEAD_DIMS = (2, 6, 64, 80, 96, 128, 250, 512)

each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_number_of_streams = pytest.mark.parametrize("streams", [1, 2])


def assert_same(actual: list[Tensor], expected: list[Tensor], call: Call) -> None:
    for name, got, wanted in zip(call.names, actual, expected, strict=True):
        assert_equal(got, wanted, name=name)


@each_number_of_streams
def test_reference_against_an_oracle_in_float64(streams, generator):
    call = draw_call(generator, streams=streams, head_dim=10, dtype=torch.float64)
    for ours, oracle in zip(run("reference", call), plain(call, torch.float64), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


@each_number_of_streams
def test_reference_gradients_by_finite_differences(streams, generator):
    sizes = {"batch": 2, "video": 3, "text": 2, "heads": 2, "head_dim": 4}
    call = draw_call(generator, streams=streams, dtype=torch.float64, **sizes)
    leaves = [t.requires_grad_() for t in call.leaves]
    assert torch.autograd.gradcheck(lambda *given: apply(call.with_leaves(given)), leaves)


@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FAST)
def test_values_far_from_normal(name, family, dtype, generator):
    call = draw_call(generator, head_dim=128, dtype=dtype, family=family)
    assert_right(run(name, call), call)


@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FAST)
def test_every_head_size(name, head_dim, dtype, generator):
    for streams in (1, 2):
        call = draw_call(generator, streams=streams, head_dim=head_dim, dtype=dtype)
        assert_right(run(name, call), call)


@pytest.mark.parametrize("head_dim", [2, 64, 80, 128, 512])
@pytest.mark.skipif("triton_impl" not in ON_CPU, reason="needs Triton's interpreter")
def test_triton_at_every_head_size(head_dim, generator):
    sizes = {"batch": 1, "video": 5, "text": 4, "heads": 2, "head_dim": head_dim}
    for streams, dtype in ((2, torch.bfloat16), (1, DTYPES[head_dim // 8 % 3])):
        call = draw_call(generator, streams=streams, dtype=dtype, **sizes)
        assert_right(run("triton_impl", call), call)


@pytest.mark.skipif("triton_impl" not in ON_CPU, reason="needs Triton's interpreter")
def test_triton_programs_of_many_heads_and_tiles(generator, monkeypatch):
    monkeypatch.setattr(config, "MANY_PROGRAMS", 1)
    call = draw_call(generator, video=19, text=7, heads=3, head_dim=96, dtype=torch.bfloat16)
    assert_right(run("triton_impl", call), call)


@pytest.mark.parametrize("name", FAST)
def test_random_shapes(name, generator):
    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for round_number in range(12):
        head_dim = 2 * pick(1, 256)
        call = draw_call(
            generator,
            batch=pick(1, 4),
            video=pick(0, 20),
            text=pick(1, 9),
            heads=pick(1, 8192 // head_dim if round_number % 4 == 0 else 8),
            head_dim=head_dim,
            streams=pick(1, 2),
            dtype=DTYPES[pick(0, 2)],
        )
        assert_right(run(name, call), call)


@pytest.mark.parametrize("name", FAST)
def test_sums_over_many_rows(name, generator):
    call = draw_call(generator, batch=3, video=700, text=33, heads=4, head_dim=64)
    assert_right(run(name, call), call)


@each_implementation
def test_one_row_and_tiny_values_that_need_the_epsilon(name, generator):
    sizes = {"batch": 1, "video": 1, "text": 0, "dtype": torch.bfloat16}
    call = draw_call(generator, family="tiny", streams=1, eps=1e-5, **sizes)
    assert_right(run(name, call), call)


@pytest.mark.parametrize(
    "sizes",
    [(0, 4, 3, 2), (0, 4, 3, 1), (2, 0, 0, 2), (2, 0, 0, 1), (2, 4, 0, 2), (2, 4, 0, 1)]
    + [(2, 0, 4, 2), (2, 0, 4, 1)],
    ids=str,
)
@each_implementation
def test_without_rows_of_one_kind_or_any(name, sizes, generator):
    batch, video, text, streams = sizes
    call = draw_call(generator, batch=batch, video=video, text=text, streams=streams, head_dim=8)
    results = run(name, call)
    assert results[0].shape == (batch, video + text, 2, 8)
    assert_right(results, call)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_implementation
def test_layouts_do_not_matter(name, layout, generator):
    sizes = {"video": 3, "text": 2, "head_dim": 20}
    call = draw_call(generator, dtype=torch.bfloat16, **sizes)
    qkv, q_weight, k_weight, text_qkv, *text_weights = call.leaves
    other = LAYOUTS[(LAYOUTS.index(layout) + 1) % len(LAYOUTS)]
    awkward = replace(
        call.with_leaves(
            [with_layout(qkv, layout), q_weight[None].mT[:, 0], k_weight]
            + [with_layout(text_qkv, other), *text_weights]
        ),
        tables=(with_layout(call.tables[0], "sliced"), with_layout(call.tables[1], "transposed")),
        gradients=(
            with_layout(call.gradients[0], other),
            call.gradients[1].transpose(1, 2).contiguous().transpose(1, 2),  # as attention returns
            with_layout(call.gradients[2], layout),
        ),
    )
    simple = replace(
        call.with_leaves([t.contiguous().clone() for t in awkward.leaves]),
        gradients=tuple(t.contiguous().clone() for t in awkward.gradients),
    )
    results = run(name, awkward)
    assert_same(results, run(name, simple), call)
    assert all(t.is_contiguous() for t in results)


@each_implementation
def test_columns_of_a_wider_result(name, generator):
    """As the single block has it: qkv are the first columns of one projection."""
    call = draw_call(generator, streams=1, head_dim=16, dtype=torch.bfloat16)
    batch, length, width = call.qkv.shape
    wide = torch.full((batch, length, width + 128), torch.nan, dtype=torch.bfloat16)
    wide[..., :width] = call.qkv
    columns = call.with_leaves([wide.split([width, 128], dim=-1)[0], *call.weights])
    assert_same(run(name, columns), run(name, call), call)


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_last_dimension_may_be_strided(name, generator):
    call = draw_call(generator, heads=1, head_dim=6)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (*call.leaves, *call.gradients)]
    assert spread[0].stride(-1) == 2
    strided = replace(
        call.with_leaves(spread[:6]),
        gradients=tuple(spread[6:]),
        tables=tuple(t.repeat_interleave(2, -1)[..., ::2] for t in call.tables),
    )
    assert_same(run(name, strided), run(name, call), call)


@each_implementation
def test_only_the_even_features_of_the_tables_are_read(name, generator):
    call = draw_call(generator, batch=1, heads=1, head_dim=8)
    tables = [table.clone() for table in call.tables]
    for table in tables:
        table[:, 1::2] = torch.nan
    assert_same(run(name, replace(call, tables=tuple(tables))), run(name, call), call)


@pytest.mark.parametrize("far", ["rows", "samples", "gradients", "heads of gradients"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_memory_past_two_to_the_31(name, far, generator):
    batch, length, heads = {"samples": (3, 1, 1), "heads of gradients": (1, 1, 3)}.get(
        far, (1, 3, 1)
    )
    sizes = {"batch": batch, "video": length, "text": length, "heads": heads}
    call = draw_call(generator, dtype=torch.bfloat16, **sizes)
    step = 2**30 + 64

    def distant(t: Tensor, *strides: int) -> Tensor:
        return far_apart(t.shape, strides).copy_(t)

    if "gradients" in far:
        strides = (0, step, 64) if far == "gradients" else (0, 3 * 64, step)
        moved = replace(call, gradients=tuple(distant(t, *strides, 1) for t in call.gradients))
    else:
        strides = (step, 192) if far == "samples" else (0, step)
        qkv, text_qkv = (distant(t, *strides, 1) for t in (call.qkv, call.text[0]))
        moved = call.with_leaves([qkv, *call.weights, text_qkv, *call.text[1:]])
    assert_same(run(name, moved), run(name, call), call)


@each_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: f"weights_{str(dtype)[6:]}")
@each_implementation
def test_weights_of_another_dtype_are_read_exactly(name, weight_dtype, dtype, generator):
    sizes = {"batch": 1, "video": 2, "text": 1, "heads": 1, "head_dim": 32}
    call = draw_call(generator, dtype=dtype, weight_dtype=weight_dtype, **sizes)
    results, exact = run(name, call), plain(call, torch.float64)
    for got, true, leaf in zip(results[3:], exact[3:], call.leaves, strict=True):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got.double(), true.to(got.dtype).double(), rtol=1e-2, atol=1e-3)
    for got, true in zip(results[:2], exact[:2], strict=True):
        assert got.dtype == dtype
        error = (got.double() - true).abs()
        assert (error <= 0.501 * torch.finfo(dtype).eps * true.abs() + 1e-6).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("feature", [6, 7])
@each_implementation
def test_a_bad_row_stays_alone(name, feature, value, generator):
    sizes = {"video": 3, "text": 2, "head_dim": 20, "dtype": torch.bfloat16}
    for row in (1, 4):  # video, text
        call = draw_call(generator, streams=1, **sizes)
        clean = run(name, call)
        call.qkv[1, row, feature] = value
        results = run(name, call)
        bad = torch.zeros(2, 5, dtype=torch.bool)
        bad[1, row] = True
        for index in range(4):
            assert_equal(results[index][~bad], clean[index][~bad])
        q, k, v, dqkv, dq_weight, dk_weight = results
        assert q[bad][:, 0].isnan().any() and dqkv[bad][:, :20].isnan().all()
        assert_equal(q[bad][:, 1], clean[0][bad][:, 1], name="the head beside it")
        assert_equal(k, clean[1])
        assert_equal(v, clean[2])
        assert_equal(dk_weight, clean[5])
        assert dq_weight.isnan().any(), "a sum over all rows"


@each_number_of_streams
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_implementations_agree_on_what_is_not_finite(value, streams, generator):
    call = draw_call(generator, streams=streams, head_dim=8, dtype=torch.bfloat16)
    call.qkv[0, 1, 3] = value
    call.leaves[3 if streams == 2 else 0][1, -1, 4] = value
    first, *others = (run(name, call) for name in ON_CPU)
    for other in others:
        for name, got, wanted in zip(call.names, other, first, strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(got), kind(wanted)), name


@pytest.mark.parametrize("name", ON_CPU)
def test_two_streams_of_equal_weights_are_one_stream(name, generator):
    two = draw_call(generator, head_dim=20, dtype=torch.bfloat16)
    two = two.with_leaves([two.qkv, *two.weights, two.text[0], *two.weights])
    one = replace(two, qkv=torch.cat((two.qkv, two.text[0]), dim=1), text=())
    of_two, of_one = run(name, two), run(name, one)
    for index in range(3):
        assert_equal(of_two[index], of_one[index])
    assert_equal(torch.cat((of_two[3], of_two[6]), dim=1), of_one[3])
    for video, text, whole in zip(of_two[4:6], of_two[7:], of_one[4:], strict=True):
        torch.testing.assert_close((video + text).float(), whole.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", FAST)
def test_closer_to_the_truth_than_step_by_step(name, generator):
    """Norm, weight and rotation one after the other round three times."""
    call = draw_call(generator, streams=1, heads=3, head_dim=128, dtype=torch.bfloat16)
    packed = call.qkv.unflatten(-1, (3, 3, 128)).unbind(2)
    exact, ours = plain(call, torch.float64), run(name, call)
    for index, (x, weight) in enumerate(zip(packed[:2], call.weights, strict=False)):
        normed = torch.nn.functional.rms_norm(x.float(), (128,), eps=call.eps).bfloat16()
        theirs = apply_rope3d(normed * weight.bfloat16(), *call.tables)
        errors = [(x.double() - exact[index]).square().mean() for x in (ours[index], theirs)]
        assert errors[0] < 0.8 * errors[1] < 1e-4


@pytest.mark.parametrize("name", FAST)
def test_the_same_bits_at_every_run(name, generator):
    call = draw_call(generator, video=300, text=20, head_dim=80, dtype=torch.bfloat16)
    first = run(name, call)
    for _ in range(10):
        assert_same(run(name, call), first, call)


def test_cpu_kernels_do_not_depend_on_the_number_of_threads(generator):
    pytest.importorskip("hunyuan_fast._C")
    call = draw_call(generator, video=300, text=20, head_dim=96, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run("cpu_impl", call))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0], call)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    pytest.importorskip("hunyuan_fast._C")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [__file__, __file__.replace(".py", "_large.py")]
        + ["-k", "(cpu_impl and (every_head_size or bad_row)) or large"],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
