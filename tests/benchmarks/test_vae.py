"""The benchmark of the autoencoder: the same weights, the same result, work and memory counted."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import bench_vae, shapes, vae_flops
from benchmarks.kit import chart, record, resident, run
from benchmarks.kit.case import FORWARD, Entrant, Peer, Work
from benchmarks.kit.clock import HostClock
from benchmarks.kit.floor import COMPUTE, CONV3D, COPY, MATMUL, Probe, floors
from benchmarks.kit.measure import Setting, measure
from benchmarks.kit.pairing import Entry, Rounds
from benchmarks.kit.table import distances, rates
from hunyuan_fast import dispatch
from hunyuan_fast.models.vae.config import VAEConfig
from tests.benchmarks.fakes import measurement

CPU = torch.device("cpu")
FUNCTIONS = (bench_vae.DECODE, bench_vae.ENCODE)
TWO_ROUNDS = Rounds(budget=1e3, least=2, most=2)


def quick_cases():
    return {case.function: case for case in bench_vae.cases(CPU, quick=True)}


def measured(case):
    setting = Setting(CPU, HostClock(min_sample_seconds=0.0), TWO_ROUNDS)
    return measure("vae", case, FORWARD, setting)


def test_a_quick_run_compares_both_ways_with_diffusers(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(record, "SCRATCH", tmp_path)
    monkeypatch.setattr(run, "QUICK", TWO_ROUNDS)
    monkeypatch.setattr(chart, "can_draw", lambda: False)
    assert command.main(["vae", "--quick", "--skip-test", "--device", "cpu"]) == 0
    (path,) = tmp_path.glob("*/vae.json")
    kept = record.load(path)
    assert [(m.function, m.what) for m in kept.measurements] == [
        (function, FORWARD) for function in FUNCTIONS
    ]
    for m in kept.measurements:
        ours, theirs = m.timings
        assert (ours.name, theirs.name) == ("hunyuan_fast", "diffusers") and ours.answers
        assert theirs.difference < 1e-5
        assert 0 < m.num_flops < m.plain_flops
        assert m.conv3d_tflop_per_s > 0 and m.matmul_tflop_per_s > 0
    assert "layers as written" in capsys.readouterr().out


@pytest.mark.parametrize("function", FUNCTIONS)
def test_another_weight_is_seen_unless_tiles_excuse_it(function, monkeypatch):
    pytest.importorskip("diffusers")
    case = quick_cases()[function]
    network = bench_vae._Network(bench_vae._QUICK, torch.float32, CPU)
    half = network.twin.decoder if function == bench_vae.DECODE else network.twin.encoder
    half.conv_out.conv.weight.data = 2 * half.conv_out.conv.weight
    for same, told in ((True, {"diffusers"}), (False, set())):
        wrong = Peer("diffusers", lambda: network.theirs(function, tiled=False), same=same)
        changed = replace(case, peers=(wrong,))
        found = measured(changed)
        assert found.declined.keys() == told
        assert same or found.timings[1].difference > 1e-2


def test_both_hold_the_same_memory():
    pytest.importorskip("diffusers")
    network = bench_vae._Network(bench_vae._QUICK, torch.float32, CPU)
    ours, theirs = (
        {p.data_ptr() for p in vae.parameters()} for vae in (network.native, network.twin)
    )
    assert ours == theirs


def test_on_a_gpu_diffusers_keeps_its_own_tiles():
    pytest.importorskip("diffusers")
    network = bench_vae._Network(bench_vae._QUICK, torch.float32, CPU)
    clip = shapes.Clip("long", 21, 16, 16)
    case = bench_vae._case(bench_vae.DECODE, clip, network, tiled=True)
    (peer,) = case.peers
    assert peer.name == "diffusers tiled" and not peer.same
    (z,) = case.inputs(torch.Generator().manual_seed(0))
    with torch.no_grad():
        tiled, whole = peer.build()(z), network.theirs(bench_vae.DECODE, tiled=False)(z)
    assert tiled.shape == whole.shape and not torch.allclose(tiled, whole)


def out_of_memory(*_: object, **__: object):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 57 GiB.")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_cases_of_a_gpu_have_a_budget_and_name_the_convolutions(function, monkeypatch):
    pytest.importorskip("diffusers")
    asked = []

    def by_name(device, **chosen):
        asked.append(chosen)
        return partial(dispatch.use, "reference") if chosen.get("causal_conv3d") else None

    monkeypatch.setattr(bench_vae, "by_name", by_name)
    monkeypatch.setattr(bench_vae, "_GPU_PROBE", bench_vae._QUICK_PROBE)
    network = bench_vae._Network(bench_vae._QUICK, torch.float32, CPU)
    case = bench_vae._gpu_case(function, shapes.Clip("quick", 5, 32, 32), network)
    monkeypatch.setattr(type(network.twin), function, out_of_memory)
    found = measured(case)
    ways = ["triton_impl", "library_impl"]
    if "cuda_impl" in dispatch.implementations("causal_conv3d"):
        ways.insert(0, "cuda_impl")
    assert [t.name for t in found.timings] == [
        "hunyuan_fast",
        *(f"hunyuan_fast, convolutions by {name}" for name in ways),
    ]
    assert [t.answers for t in found.timings] == [True] + [False] * len(ways)
    assert "OutOfMemoryError: CUDA out of memory" in found.declined["diffusers tiled"]
    # with kernels that nobody has verified, what one gets without asking is not measured
    monkeypatch.setattr(bench_vae, "by_name", lambda *_, **__: partial(dispatch.use, "reference"))
    case = bench_vae._gpu_case(function, shapes.Clip("quick", 5, 32, 32), network)
    assert not any(t.answers for t in measured(case).timings)


def test_16_bits_are_held_against_fp32(monkeypatch):
    monkeypatch.setattr(bench_vae, "_PRECISION", shapes.Clip("quick", 5, 32, 32))
    monkeypatch.setattr(bench_vae, "_GPU_PROBE", bench_vae._QUICK_PROBE)
    network = bench_vae._Network(bench_vae._QUICK, torch.bfloat16, CPU)
    found = measured(bench_vae._precision_case(bench_vae.DECODE, network))
    half, fp32 = found.timings
    assert (half.name, fp32.name) == ("hunyuan_fast", "hunyuan_fast in fp32")
    assert 1e-3 < fp32.difference < 0.1
    assert distances(found).startswith("signal to noise against hunyuan_fast: hunyuan_fast in fp32")


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("attention", [True, False])
def test_diffusers_does_as_many_flops_as_the_plain_count(frames, attention):
    pytest.importorskip("diffusers")
    config = VAEConfig(
        latent_channels=4,
        block_out_channels=(8, 16, 16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=attention,
    )
    network = bench_vae._Network(config, torch.float32, CPU)
    clip = shapes.Clip("small", frames, 32, 48)
    counts = {
        bench_vae.DECODE: vae_flops.decode_flops(config, clip.latent),
        bench_vae.ENCODE: vae_flops.encode_flops(config, (frames, 32, 48)),
    }
    for function, counted in counts.items():
        inputs = network.inputs(function, clip, torch.Generator().manual_seed(0))
        call = network.theirs(function, tiled=False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(*inputs)
        missing = 0
        if attention and counter.get_total_flops() < counted.plain:
            # On a CPU the counter does not know torch's flash kernel.
            missing = 4 * config.block_out_channels[-1] * vae_flops.volume(clip.latent) ** 2
        assert counter.get_total_flops() + missing == counted.plain


@pytest.mark.parametrize(("stride", "factor"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_frames_seen_by_looking(frames, stride, factor):
    """Numbers of frames go through the padding, and those in each window are counted."""
    seen = [0] + [n for n in range(1, frames) for _ in range(factor)]
    outputs = (len(seen) - 1) // stride + 1
    windows = [([0, 0, *seen])[o * stride : o * stride + 3] for o in range(outputs)]
    expected = sum(len(set(window)) for window in windows)
    assert vae_flops.frames_seen(outputs, 3, stride=stride, factor=factor) == expected
    assert vae_flops.frames_seen(outputs, 1) == outputs


def test_the_least_count_is_that_of_the_phases():
    flops = vae_flops.Flops()
    assert flops.upsample(2, (3, 4, 5), (2, 2, 2)) == (5, 8, 10)
    assert flops.least == 2 * 2 * 2 * 80 * (2 * 2) * (1 + 2 + 2 + 2 + 2)
    assert flops.plain == 2 * 2 * 2 * 80 * 27 * 5
    real = vae_flops.decode_flops(VAEConfig(), (5, 32, 32))
    assert real.least / real.plain == pytest.approx(0.70, abs=0.01)
    image = vae_flops.decode_flops(VAEConfig(), (1, 64, 64))
    assert image.least < 0.34 * image.plain


def test_the_peak_of_a_call_is_what_it_adds():
    size = 64 * 2**20
    held = []
    if resident.growth(lambda: None) is None:
        pytest.skip("the system does not tell")
    for _ in range(2):  # what was there before, and is given back, is not counted
        grown = resident.growth(lambda: held.append(torch.ones(size // 4)))
        assert size <= grown < 1.25 * size
        held.clear()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_long_calls_are_made_once_before_they_are_timed(function):
    pytest.importorskip("diffusers")
    case = quick_cases()[function]
    calls = []

    def build():
        call = case.ours[0].build()
        return lambda x: (calls.append(x), call(x))[1]

    ours = (Entrant("hunyuan_fast", build),)
    m = measured(replace(case, ours=ours, peers=(), rounds=TWO_ROUNDS, large=True))
    assert len(calls) == 1 + 2
    assert m.timings[0].calls == 1
    assert (m.timings[0].peak_mib is None) == (resident.growth(lambda: None) is None)


def test_rates_are_told_where_a_convolution_was_timed():
    counted = {"num_flops": 10**9, "plain_flops": 3 * 10**9, "matmul_tflop_per_s": 2.0}
    assert rates(measurement(**counted)) is None
    told = rates(measurement(**counted, conv3d_tflop_per_s=1.5))
    assert "eager 0.250 (layers as written 0.750); conv3d 1.50, matmul 2.00" in told


def test_the_floor_is_set_by_the_faster_of_product_and_convolution():
    amounts = {COPY: 8.0, MATMUL: 100.0, CONV3D: 100.0}
    probes = {name: Probe(Entry(lambda: None), amount) for name, amount in amounts.items()}
    seconds = {COPY: [1.0, 1.0], MATMUL: [50.0, 20.0], CONV3D: [30.0, 40.0]}
    assert floors(probes, seconds, Work(8, 200)) == ([60.0, 40.0], COMPUTE)
    del probes[CONV3D]
    assert floors(probes, seconds, Work(8, 200)) == ([100.0, 40.0], COMPUTE)


@pytest.mark.gpu
def test_a_gpu_compares_them_too():
    pytest.importorskip("diffusers")
    assert all(peer.name == "diffusers tiled" for peer in _gpu_peers(quick=False))
    assert all(peer.name == "diffusers" for peer in _gpu_peers(quick=True))


def _gpu_peers(*, quick):
    cases = bench_vae.cases(torch.device("cuda"), quick=quick)
    return [peer for case in cases for peer in case.peers]
