"""Gated residual sum, alone and with the norm in one pass, one vector per sample or several."""

import itertools

import pytest
import torch

from hunyuan_fast import ops
from hunyuan_fast.dispatch import implementations, select, use
from hunyuan_fast.kernels.fused_modulation import config, reference
from tests.kit.inputs import FAMILIES, LAYOUTS, with_layout
from tests.kit.memory import far_apart
from tests.kit.numerics import assert_as_good_as, assert_equal
from tests.ops.fused_modulation_cases import (
    BOTH,
    DTYPES,
    FUNCTIONS,
    GATE,
    ON_CPU,
    ROOM,
    assert_right,
    assert_same_bits,
    assert_same_bits_at,
    draw_call,
    each_dtype,
    each_function,
    each_gated_function,
    each_implementation,
    each_quick_implementation,
    plain,
    run,
)


@each_function
@pytest.mark.parametrize("num_vectors", [None, 3])
def test_reference_against_an_oracle_in_float64(num_vectors, function, generator):
    call = draw_call(function, (2, 5, 33), generator, torch.float64, num_vectors=num_vectors)
    ours, oracle = run("reference", call), plain(call, torch.float64)
    for name, got in ours.items():
        torch.testing.assert_close(got, oracle[name], rtol=1e-12, atol=1e-12)


@each_function
@pytest.mark.parametrize("num_vectors", [None, 2])
def test_reference_gradients_by_finite_differences(num_vectors, function, generator):
    call = draw_call(function, (2, 3, 5), generator, torch.float64, num_vectors=num_vectors)
    leaves = [t.requires_grad_() for t in call.tensors.values()]

    def public(*tensors):
        return getattr(ops, function)(*tensors, index=call.index)

    assert torch.autograd.gradcheck(public, leaves)


@each_dtype
@each_gated_function
@pytest.mark.parametrize("family", FAMILIES)
@each_quick_implementation
def test_values_far_from_normal(name, family, function, dtype, generator):
    call = draw_call(function, (2, 7, 3072), generator, dtype, family)
    assert_right(run(name, call), call)


@each_dtype
@each_gated_function
@pytest.mark.parametrize("width", [1, 7, 64, 1023, 3072])
@each_implementation
def test_every_width(name, width, function, dtype, generator):
    # of few columns the worst error is a matter of luck, so there are more samples of them
    call = draw_call(function, (4 if width < 64 else 1, 5, width), generator, dtype)
    if width > 1:
        return assert_right(run(name, call), call)
    # of one element the norm leaves the shift, and its gradient is rounding times 1/sqrt(eps)
    results = run(name, call)
    shift = call.tensors.get("shift")
    if shift is not None:
        assert_equal(results["modulated"], shift[:, None].expand(4, 5, 1))
    assert all(t.isfinite().all() for t in results.values())
    return None


@each_quick_implementation
def test_random_shapes(name, generator):
    for round_number in range(12):
        draws = [int(torch.randint(1, high, (), generator=generator)) for high in (5, 40, 8192)]
        call = draw_call(
            FUNCTIONS[round_number % 3],
            (draws[0], draws[1], draws[2] + 1),
            generator,
            DTYPES[sum(draws) % 3],
            num_vectors=(None, 1, 2, 5)[round_number % 4],
        )
        assert_right(run(name, call), call)


@each_dtype
@each_function
@each_implementation
def test_vectors_chosen_by_index(name, function, dtype, generator):
    call = draw_call(function, (2, 11, 100), generator, dtype, num_vectors=3)
    results = run(name, call)
    assert_right(results, call)
    narrow = run(name, call.map(lambda t: t if t.is_floating_point() else t.int()))
    assert_same_bits(narrow, results)


@each_function
@each_implementation
def test_an_index_of_zeros_is_no_index(name, function, generator):
    """Bit for bit: neither the vectors nor the order of the sums depend on how they are chosen."""
    alone = draw_call(function, (2, 9, 72), generator, torch.bfloat16)
    vectors = {n: t[:, None] for n, t in alone.tensors.items() if t.dim() == 2}
    chosen = alone.with_tensors(**vectors)
    chosen = type(chosen)(function, chosen.tensors, alone.gradients, torch.zeros(2, 9).long())
    results = run(name, chosen)
    for each in ("dgate", "dshift", "dscale"):
        if each in results:
            assert results[each].shape == (2, 1, 72)
            results[each] = results[each][:, 0]
    assert_same_bits(results, run(name, alone))


@each_function
@each_implementation
def test_vectors_without_tokens_have_no_gradient(name, function, generator):
    call = draw_call(function, (1, 6, 40), generator, num_vectors=4)
    call.index.copy_(torch.tensor([[3, 3, 1, 3, 1, 1]]))
    results = run(name, call)
    for each in {"dgate", "dshift", "dscale"} & results.keys():
        assert_equal(results[each][:, [0, 2]], torch.zeros(1, 2, 40))
        assert (results[each][:, [1, 3]] != 0).all()


@each_implementation
def test_the_norm_is_of_the_rounded_sum(name, generator):
    """Both at once give the bits of one after the other, forward."""
    for dtype, vectors in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        call = draw_call(BOTH, (2, 5, 200), generator, dtype, vector_dtype=vectors, num_vectors=2)
        x, y, gate, shift, scale = call.tensors.values()
        with use(name, ROOM):
            residual, modulated = ops.gate_residual_layer_norm_modulate(
                *call.tensors.values(), index=call.index
            )
            apart = ops.gate_residual(x, y, gate, index=call.index)
            assert_equal(residual, apart)
            assert_equal(modulated, ops.layer_norm_modulate(apart, shift, scale, index=call.index))


@pytest.mark.parametrize("y_dtype", DTYPES, ids=lambda dtype: f"y_{str(dtype)[6:]}")
@pytest.mark.parametrize("vector_dtype", DTYPES, ids=lambda dtype: f"vectors_{str(dtype)[6:]}")
@each_gated_function
@each_implementation
def test_a_stream_in_fp32_takes_branches_of_16_bits(
    name, function, y_dtype, vector_dtype, generator
):
    shape = (2, 5, 70)
    call = draw_call(function, shape, generator, y_dtype=y_dtype, vector_dtype=vector_dtype)
    results = run(name, call)
    assert_right(results, call)
    for each, t in call.tensors.items():
        assert results[f"d{each}"].dtype == t.dtype
    assert results["residual"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("num_vectors", [None, 2])
@each_function
@each_implementation
def test_no_rows(name, function, num_vectors, shape, generator):
    call = draw_call(function, shape, generator, torch.bfloat16, num_vectors=num_vectors)
    results = run(name, call)
    for each, t in call.tensors.items():
        assert_equal(results[f"d{each}"], torch.zeros_like(t))
    assert all(results[each].shape == shape for each in call.gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_gated_function
@each_implementation
def test_layouts_do_not_matter(name, function, layout, generator):
    call = draw_call(function, (2, 6, 127), generator, torch.bfloat16, num_vectors=2)
    awkward = call.map(
        lambda t: with_layout(t, layout) if t.is_floating_point() else t.mT.contiguous().mT
    )
    simple = awkward.map(lambda t: t.contiguous().clone())
    results = run(name, awkward)
    assert_same_bits(results, run(name, simple))
    if function == GATE:
        del results["dx"]  # the gradient that came in
    assert all(t.is_contiguous() for t in results.values())


@each_gated_function
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_last_dimension_may_be_strided(name, function, generator):
    call = draw_call(function, (2, 7, 5), generator)
    strided = call.map(lambda t: t.mT.contiguous().mT)
    assert all(t.stride(-1) != 1 for t in strided.tensors.values())
    assert_same_bits(run(name, strided), run(name, call))


@pytest.mark.parametrize("far", ["rows", "samples", "vectors"])
@each_gated_function
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "reference"])
def test_memory_past_two_to_the_31(name, function, far, generator):
    shape = (1, 3, 64) if far == "rows" else (3, 1, 64)
    call = draw_call(function, shape, generator, torch.bfloat16, num_vectors=2)
    step = 2**30 + 64
    rows = {"rows": (3 * step, step, 1), "samples": (step, 64, 1)}.get(far)

    def distant(t):
        if t.is_floating_point() and t.shape == shape and rows is not None:
            return far_apart(shape, rows).copy_(t)
        if t.is_floating_point() and t.shape != shape and far == "vectors":
            return far_apart(t.shape, (2 * step, step, 1)).copy_(t)
        return t

    assert_same_bits(run(name, call.map(distant)), run(name, call))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x", "y"])
@each_gated_function
@each_implementation
def test_a_bad_row_stays_alone(name, function, where, value, generator):
    call = draw_call(function, (2, 4, 130), generator, torch.bfloat16, num_vectors=2)
    call.index.copy_(torch.tensor([[0, 1, 0, 1], [1, 1, 0, 1]]))
    clean = run(name, call)
    call.tensors[where][1, 2, 129] = value
    results = run(name, call)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert not results["residual"][1, 2, 129].isfinite()
    if function == BOTH:
        assert results["modulated"][bad].isnan().all() and results["dx"][bad].isnan().all()
    assert_same_bits_at({"dx", "dy", *call.gradients}, results, clean, ~bad)
    # of the sums only those of the row's own vector see it
    sums = {"dgate", "dshift", "dscale"} & results.keys()
    assert_same_bits_at(sums, results, clean, 0)
    assert_same_bits_at(sums, results, clean, (1, 1))


@each_gated_function
@each_implementation
def test_a_sample_does_not_depend_on_its_batch(name, function, generator):
    call = draw_call(function, (3, 5, 96), generator, torch.bfloat16, num_vectors=2)
    whole = run(name, call)
    for b in range(3):
        one = run(name, call.map(lambda t, b=b: t[b : b + 1]))
        assert_same_bits(one, {each: t[b : b + 1] for each, t in whole.items()})


@each_gated_function
def test_implementations_exchange_statistics(function, generator):
    call = draw_call(function, (2, 6, 200), generator, torch.bfloat16, num_vectors=2)
    t, d = call.tensors, call.gradients
    args = (t["x"], t.get("shift"), t.get("scale"), 1e-6, t["y"], t["gate"], call.index)
    usable = [impl for name, impl in implementations(ROOM).items() if name in ON_CPU]
    for first, second in itertools.permutations(usable, 2):
        residual, _, stats = first.forward(*args)
        exact, same = (plain(call, x, residual) for x in (torch.float64, torch.bfloat16))
        saved = (residual, t["scale"], stats) if function == BOTH else (None, None, None)
        gradients = second.backward(
            d.get("modulated"), *saved, d["residual"], t["y"], t["gate"], call.index, torch.bfloat16
        )
        names = ("dx", "dshift", "dscale", "dy", "dgate")
        for name, got in zip(names, gradients, strict=True):
            if got is not None:
                assert_as_good_as(got, exact[name], same[name], name=name)


@each_gated_function
@each_quick_implementation
def test_the_same_bits_at_every_run(name, function, generator):
    call = draw_call(function, (2, 300, 257), generator, torch.bfloat16, num_vectors=2)
    first = run(name, call)
    for _ in range(5):
        assert_same_bits(run(name, call), first)


@each_function
@pytest.mark.parametrize("num_vectors", [None, 3])
def test_cpu_kernels_do_not_depend_on_the_number_of_threads(num_vectors, function, generator):
    pytest.importorskip("hunyuan_fast._C")
    shape = (2, 300, 1025)
    call = draw_call(function, shape, generator, torch.bfloat16, num_vectors=num_vectors)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run("cpu_impl", call))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("missing", ["residual", "modulated"])
@each_implementation
def test_a_result_that_nobody_uses(name, missing, generator):
    """Its gradient is zero, without being made."""
    call = draw_call(BOTH, (2, 5, 64), generator, torch.bfloat16)
    silent = call.gradients | {missing: torch.zeros_like(call.gradients[missing])}
    expected = run(name, type(call)(BOTH, call.tensors, silent))
    leaves = [t.detach().requires_grad_() for t in call.tensors.values()]
    with use(name, ROOM):
        results = ops.gate_residual_layer_norm_modulate(*leaves)
        used = "modulated" if missing == "residual" else "residual"
        out = results[used == "modulated"]
        gradients = torch.autograd.grad(out, leaves, call.gradients[used], allow_unused=True)
    for each, got in zip(call.tensors, gradients, strict=True):
        if got is None:
            assert missing == "modulated" and each in ("shift", "scale")
        else:
            assert_equal(got, expected[f"d{each}"], name=each)


@pytest.mark.parametrize("count", [1, 2])
@each_gated_function
@each_implementation
def test_gradients_of_some_inputs_only(name, function, count, generator):
    call = draw_call(function, (2, 3, 40), generator)
    whole = run(name, call)
    for needed in itertools.combinations(call.tensors, count):
        leaves = {n: t.detach().requires_grad_(n in needed) for n, t in call.tensors.items()}
        with use(name, ROOM):
            results = getattr(ops, function)(*leaves.values())
            results = results if isinstance(results, tuple) else (results,)
            # a result that no wanted gradient leads to carries none
            pairs = zip(results, call.gradients.values(), strict=True)
            torch.autograd.backward(*zip(*[p for p in pairs if p[0].requires_grad], strict=True))
        for each, leaf in leaves.items():
            if each in needed:
                assert_equal(leaf.grad, whole[f"d{each}"])
            else:
                assert leaf.grad is None


@each_gated_function
def test_backward_keeps_what_the_gradients_need(function, generator):
    """y only for dgate, and of the norm half the residual instead of x."""
    call = draw_call(function, (1, 4, 32), generator)
    kept: list[int] = []
    for needed in ("y", "gate"):
        leaves = {n: t.detach().requires_grad_(n == needed) for n, t in call.tensors.items()}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.data_ptr()) or t, lambda t: t
        ):
            getattr(ops, function)(*leaves.values())
        assert (leaves["y"].data_ptr() in kept) == (needed == "gate")
        assert leaves["x"].data_ptr() not in kept


def test_chunks_share_their_room_among_vectors():
    for length in (1, 180, 2304, 119_056):
        for vectors in (1, 2, 3, config.MAX_VECTORS):
            for rows in (
                config.rows_per_chunk(length, vectors),
                config.gpu_rows_per_chunk(length, vectors),
            ):
                chunks = -(-length // rows)
                assert (chunks - 1) * rows < length <= chunks * rows
            assert -(-length // config.rows_per_chunk(length, vectors)) * vectors <= 128


def test_too_many_vectors_go_to_the_reference(generator):
    many = config.MAX_VECTORS + 1
    call = draw_call(BOTH, (1, 3, 8), generator, num_vectors=many)
    t = call.tensors
    args = (t["x"], t["shift"], t["scale"], 1e-6, t["y"], t["gate"], call.index)
    for name in {"cpu_impl", "triton_impl"} & set(ON_CPU):
        reason = implementations(ROOM)[name].supports(*args)
        assert reason == f"a sample may have at most {many - 1} vectors, M is {many}"
    assert select(ROOM, *args) is reference
    with use("reference", ROOM):
        expected = ops.layer_norm_modulate(t["x"], t["shift"], t["scale"], index=call.index)
    assert_equal(
        ops.layer_norm_modulate(t["x"], t["shift"], t["scale"], index=call.index), expected
    )
