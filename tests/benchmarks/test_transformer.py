"""The benchmark of whole steps: both models hold the same weights and compute the same thing."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_transformer as bench
from benchmarks import shapes, transformer_twins
from benchmarks.kit import floor
from benchmarks.kit.case import FORWARD, TRAINING, Entrant, Unavailable
from benchmarks.kit.clock import CudaClock, HostClock
from benchmarks.kit.measure import Setting, measure
from benchmarks.kit.pairing import Rounds
from benchmarks.kit.table import cosines
from benchmarks.transformer_twins import Source, twins
from hunyuan_fast import dispatch
from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.modules.fp8 import FP8

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLIP = shapes.tokens("tiny", 5, 32, 64, text=8)
TINY = TransformerConfig(
    hidden_size=64,
    heads_num=2,
    rope_dim_list=(8, 12, 12),
    mm_double_blocks_depth=2,
    mm_single_blocks_depth=2,
    in_channels=4,
    out_channels=4,
    text_states_dim=24,
    text_states_dim_2=12,
)
TWO_ROUNDS = Rounds(budget=1e3, least=2, most=2)
NAMES = ["hunyuan_fast", "diffusers"]


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """No floor is looked at here."""
    monkeypatch.setitem(floor._MATMUL_SIZE, "cpu", 64)


@pytest.fixture
def source():
    pytest.importorskip("diffusers")
    return Source(TINY, torch.float32, CPU)


def measured(case, what):
    setting = Setting(CPU, HostClock(cache_bytes=1, min_sample_seconds=0.0), TWO_ROUNDS)
    return measure("transformer", case, what, setting)


def test_a_denoising_step_is_that_of_diffusers(source):
    m = measured(bench._denoise(CLIP, source, quick=True), FORWARD)
    assert [t.name for t in m.timings] == NAMES and m.timings[0].answers
    assert m.timings[1].difference < 1e-5
    assert m.declined.keys() == {f"{name} compiled" for name in NAMES}
    assert m.num_flops > 0 and m.shape["single"] == 2


def test_a_step_gives_the_velocity_and_the_latents_of_the_next_level(source):
    step = bench._Step(CLIP, source)
    latents, *text = step.inputs(torch.Generator().manual_seed(0))
    for build in (step.ours, step.theirs):
        call = build()
        with torch.no_grad():
            results = [call(latents, *text) for _ in range(2)]  # the second one is no later step
        velocity, moved = results[1]
        assert torch.equal(results[0][1], moved)
        sigmas = step.constants()[0]
        expected = latents + velocity * (sigmas[bench._STEP + 1] - sigmas[bench._STEP])
        torch.testing.assert_close(moved, expected)
        assert velocity.std() > 0.1


def test_a_training_step_has_all_gradients_with_and_without_recomputation(source):
    m = measured(bench._train(CLIP, source), TRAINING)
    found = {t.name: t for t in m.timings}
    again = [f"{name} checkpointing" for name in NAMES]
    assert found.keys() == {*NAMES, *again} and not m.declined
    assert all(t.difference < 1e-4 for t in m.timings)
    for plain, less in zip(NAMES, again, strict=True):
        assert found[less].kept_mib < 0.5 * found[plain].kept_mib


def test_another_weight_is_seen(source, monkeypatch):
    for case, what in (
        (bench._denoise(CLIP, source, quick=True), FORWARD),
        (bench._train(CLIP, source), TRAINING),
    ):
        real = transformer_twins.Twins.theirs

        def changed(self, real=real, **how):
            twin = real(self, **how)
            weight = twin.single_transformer_blocks[1].attn.norm_k.weight
            weight.data = 2 * weight.data
            return twin

        with monkeypatch.context() as patch:
            patch.setattr(transformer_twins.Twins, "theirs", changed)
            assert "computes something else" in measured(case, what).declined["diffusers"]


def test_all_hold_the_same_memory(source):
    pair = twins(source)
    native = {p.untyped_storage().data_ptr() for p in pair.native.parameters()}
    for how in ({}, {"checkpointing": True}, {"fp8_attention": True}):
        ours = pair.ours(**how)
        assert {p.untyped_storage().data_ptr() for p in ours.parameters()} == native
        assert all(p.requires_grad for p in ours.parameters())
    theirs = pair.theirs()
    apart = {
        name
        for name, p in theirs.named_parameters()
        if p.untyped_storage().data_ptr() not in native
    }
    assert apart == {"norm_out.linear.weight", "norm_out.linear.bias"}
    joined = pair.join(pair.weights_of_theirs(theirs))
    for a, b in zip(joined, pair.weights_of_ours(pair.native), strict=True):
        assert torch.equal(a, b)


def test_weights_in_eight_bits_belong_to_one_alone(source):
    pair = twins(source)
    eight = pair.ours(fp8_weights=True)
    assert eight.single_blocks[0].linear1.weight.dtype == FP8
    assert pair.native.single_blocks[0].linear1.weight.dtype == torch.float32
    assert pair.ours().single_blocks[0].linear1.weight.dtype == torch.float32


def test_only_one_source_is_held(source):
    first = twins(source)
    assert twins(replace(source)) is first
    other = twins(replace(source, dtype=torch.bfloat16))
    assert other is not first and transformer_twins._held == [other]


def test_eight_bits_are_told_and_not_judged(source):
    m = measured(bench._denoise_fp8(CLIP, replace(source, dtype=torch.bfloat16)), FORWARD)
    first, *others = m.timings
    assert first.name == "hunyuan_fast" and first.cosine is None
    ways = ["fp8 attention", "fp8 weights", "fp8 attention and weights"]
    assert [t.name for t in others] == ways and m.best_peer is None
    assert all(0.9 < t.cosine < 1 and t.difference > 1e-3 for t in others)
    assert cosines(m).startswith("cosine to hunyuan_fast: fp8 attention 0.9")


def test_gradients_in_sixteen_bits_are_not_judged(source):
    for dtype, judged in ((torch.float32, True), (torch.bfloat16, False)):
        case = bench._train(CLIP, replace(source, dtype=dtype))
        assert {each.same for each in (*case.ours, *case.peers)} == {judged}


def test_as_many_flops_are_counted_as_the_layers_do(source, monkeypatch):
    monkeypatch.setattr(shapes, "FILLED", 1.0)
    wide = replace(source, config=replace(TINY, hidden_size=128, rope_dim_list=(16, 24, 24)))
    step = bench._Step(shapes.tokens("longer", 5, 128, 128, text=32), wide)
    job = bench.job_of(step, training=False)
    assert job.video_tokens == step.clip.video and job.text_tokens == 32
    inputs = step.inputs(torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step.ours()(*inputs)
    # Our attention is an operator of its own, which the counter does not know; rows by themselves,
    # of times and modulations, are not in the count of plans.
    linear = job.linear_flops + job.outside_flops
    assert linear < counter.get_total_flops() < 1.02 * linear
    forward, training = (bench.work(step, what)[what] for what in (FORWARD, TRAINING))
    assert forward.num_flops == int(linear + job.attention_flops)
    assert training.num_flops == int(3 * linear + 3.5 * job.attention_flops)


def test_the_miniature_is_the_one_that_ships():
    assert HunyuanVideoTransformer.from_pretrained("nano").config == bench._NANO
    cases = bench.cases(CPU, quick=False)
    assert [(c.function, c.dtype_name) for c in cases] == [
        (function, dtype)
        for function in (bench.DENOISE, bench.TRAIN)
        for dtype in ("float32", "bfloat16")
    ]


def test_a_gpu_takes_the_real_model_and_asks_for_kernels_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def names(cases):
        return {(c.function, c.name): [each.name for each in c.ours] for c in cases}

    cases = bench.cases(GPU, quick=False)
    found = names(cases)
    assert len(found) == 9 and all(c.large for c in cases)
    named, compiled = "hunyuan_fast by name", "hunyuan_fast compiled"
    assert found["denoising_step", "256p-65f"] == ["hunyuan_fast", named, compiled]
    assert found["denoising_step", "720p-129f"] == [named, compiled]
    assert found["denoising_step_fp8", "720p-129f"][0] == named
    assert found["training_step", "720p-129f"] == [named, "hunyuan_fast checkpointing"]
    assert {c.name for c in cases if c.once} == {"720p-129f"}
    (longest, few) = (c for c in cases if c.name == "720p-129f" and c.peers)
    assert longest.work[FORWARD].num_flops == pytest.approx(12.06e15, rel=1e-2)
    assert longest.work[FORWARD].num_bytes > 2 * 12_821_012_544
    assert few.work[TRAINING].num_flops == pytest.approx(41.4e15 / 10, rel=1e-2)

    kernel = SimpleNamespace(VERIFIED_ON=frozenset({"sm_90"}), supports=lambda *_: None)
    monkeypatch.setattr(dispatch, "implementations", lambda op: {"reference": kernel})
    found = names(bench.cases(GPU, quick=False))
    assert found["denoising_step", "720p-129f"] == ["hunyuan_fast", compiled]


def test_who_runs_out_of_memory_is_listed(source, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 57 GiB.")

    case = bench._train(CLIP, source)
    peers = tuple(replace(each, build=lambda: out_of_memory) for each in case.peers)
    m = measured(replace(case, peers=peers), TRAINING)
    assert "OutOfMemoryError: CUDA out of memory" in m.declined["diffusers"]
    assert len(m.timings) == 2


def test_blocks_are_compiled_and_not_the_model(source, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: asked.append((type(self).__name__, how))
    )
    step = bench._Step(CLIP, source)
    bench._compiled(False, step.ours)
    kinds = ["DoubleStreamBlock"] * 2 + ["SingleStreamBlock"] * 2
    assert [name for name, _ in asked] == kinds
    assert all(how == {"fullgraph": True, "dynamic": False} for _, how in asked)
    asked.clear()
    bench._compiled(False, step.theirs)
    assert "HunyuanVideoTransformerBlock" in {name for name, _ in asked}
    with pytest.raises(Unavailable, match="no time to compile"):
        bench._compiled(True, step.ours)


def test_without_diffusers_the_reason_is_told(source, monkeypatch):
    monkeypatch.setattr(transformer_twins, "find_spec", lambda name: None)
    m = measured(bench._denoise(CLIP, source, quick=True), FORWARD)
    assert m.declined["diffusers"] == "diffusers is not installed"


@pytest.mark.gpu
def test_a_gpu_compares_them_too():
    pytest.importorskip("diffusers")
    setting = Setting(GPU, CudaClock(GPU), TWO_ROUNDS)
    for case in bench.cases(GPU, quick=True):
        (what,) = case.work
        once = replace(case, once=True)
        m = measure("transformer", once, what, setting)
        assert {"hunyuan_fast", "diffusers"} <= {t.name for t in m.timings}
        assert all(t.peak_mib > 0 for t in m.timings)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"fp8_attention": True}, {"fp8_weights": True}, None])
def test_no_kernel_of_a_gpu_lets_the_host_wait(how):
    """As users get it, and with the kernels by name; ``None`` stands for a training step."""
    step = bench._Step(CLIP, Source(bench._QUICK, torch.bfloat16, GPU))
    inputs = step.inputs(torch.Generator(GPU).manual_seed(0))
    trained = step.trained_ours() if how is None else None
    call = trained or step.ours(**how)

    def run():
        velocity = call(*inputs)
        if trained:
            torch.autograd.grad(velocity, trained.weights, velocity)

    for kernels in (nullcontext, bench._kernels(step)):
        with kernels(), torch.set_grad_enabled(trained is not None):
            run()  # kernels are compiled
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_entrants_are_named_once():
    source = Source(TINY, torch.float32, CPU)
    makers = (partial(bench._denoise, quick=True), bench._denoise_fp8, bench._train)
    for make in makers:
        case = make(CLIP, source)
        names = [each.name for each in (*case.ours, *case.peers)]
        assert len(set(names)) == len(names)
        assert all(isinstance(each, Entrant) for each in case.ours)
