"""The benchmark of whole blocks: both sides hold the same weights and compute the same thing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import bench_dit_blocks as blocks
from benchmarks import shapes
from benchmarks.kit import chart, record, run
from benchmarks.kit.case import FORWARD, PASSES, TRAINING, Weighted
from benchmarks.kit.clock import CudaClock, HostClock
from benchmarks.kit.measure import Setting, measure
from benchmarks.kit.pairing import Rounds
from hunyuan_fast import dispatch

CPU = torch.device("cpu")
KINDS = (blocks.DOUBLE, blocks.SINGLE)
CLIP = shapes.tokens("tiny", 1, 64, 96, text=16)
# And time for everyone: nobody is left out because the machine was busy during one call.
TWO_ROUNDS = Rounds(budget=1e3, least=2, most=2)


@pytest.fixture(params=KINDS)
def pair(request):
    pytest.importorskip("diffusers")
    return blocks._Pair(request.param, CLIP, 256, 2, torch.float32, CPU)


def measured(pair, what):
    setting = Setting(CPU, HostClock(cache_bytes=1, min_sample_seconds=0.0), TWO_ROUNDS)
    return measure("dit_blocks", blocks._case(pair, quick=True), what, setting)


def test_a_quick_run_compares_both_kinds_with_diffusers(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(record, "SCRATCH", tmp_path)
    monkeypatch.setattr(run, "QUICK", TWO_ROUNDS)
    monkeypatch.setattr(chart, "can_draw", lambda: False)
    arguments = ["dit_blocks", "--quick", "--skip-test", "--device", "cpu"]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*/dit_blocks.json")
    kept = record.load(path)
    assert [(m.function, m.what) for m in kept.measurements] == [
        (kind, what) for kind in KINDS for what in PASSES
    ]
    for m in kept.measurements:
        ours, theirs = m.timings
        assert (ours.name, theirs.name) == ("hunyuan_fast", "diffusers") and ours.answers
        assert theirs.difference < 1e-5
        assert (ours.kept_mib is None) == (m.what == FORWARD)
        assert m.num_flops > 0 and m.matmul_tflop_per_s is not None
        assert all("no time to compile" in reason for reason in m.declined.values())
        assert len(m.declined) == 2
    assert "kept" in capsys.readouterr().out


def test_both_hold_the_same_weights_and_train_all_of_them(pair):
    ours, theirs = pair.ours(), pair.theirs()
    assert {w.data_ptr() for w in ours.weights} <= {w.data_ptr() for w in theirs.weights}
    assert len(ours.weights) == len(list(pair.native.parameters()))
    assert len(theirs.weights) == len(list(pair.twin.parameters()))
    assert all(w.requires_grad for w in (*ours.weights, *theirs.weights))
    joined = theirs.arrange(theirs.weights)
    assert all(torch.equal(a, b) for a, b in zip(joined, ours.weights, strict=True))


@pytest.mark.parametrize("what", PASSES)
def test_in_half_precision_they_agree_as_well(pair, what):
    m = measured(replace(pair, dtype=torch.bfloat16), what)
    assert {t.name for t in m.timings} == {"hunyuan_fast", "diffusers"}


@pytest.mark.parametrize("what", PASSES)
def test_another_weight_is_seen(pair, what):
    weights = dict(pair.twin.named_parameters())
    changed = weights["attn.norm_k.weight"]
    changed.data = 2 * changed.data
    assert "computes something else" in measured(pair, what).declined["diffusers"]


def test_a_wrong_gradient_of_one_weight_is_seen(pair, monkeypatch):
    real = pair.join
    doubled = lambda gradients: [*real(gradients)[:-1], 2 * real(gradients)[-1]]  # noqa: E731
    monkeypatch.setattr(blocks._Pair, "join", lambda self, gradients: doubled(gradients))
    assert "diffusers" in {t.name for t in measured(pair, FORWARD).timings}
    assert "computes something else" in measured(pair, TRAINING).declined["diffusers"]


def test_padding_is_of_no_meaning_and_of_no_influence(pair):
    img, txt, vec = pair.inputs(torch.Generator().manual_seed(0))
    assert CLIP.video < pair.valid < CLIP.joint
    other = txt.detach().clone()
    other[:, pair.valid - CLIP.video :] = 100.0
    for call in (pair.ours(), pair.theirs()):
        with torch.no_grad():
            before, after = ([pair.meaningful(x) for x in call(img, t, vec)] for t in (txt, other))
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b)
        assert before[0].all() and not before[1][:, pair.valid - CLIP.video :].any()


@pytest.mark.parametrize("what", PASSES)
def test_the_linear_layers_do_as_many_flops_as_are_counted(pair, what, monkeypatch):
    monkeypatch.setattr(blocks, "_FILLED", 1.0)
    inputs = pair.inputs(torch.Generator().manual_seed(0))
    # Our attention is an operator of its own, which the counter does not know.
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(what == TRAINING):
        streams = pair.ours()(*inputs)
        if what == TRAINING:
            torch.autograd.backward(streams, streams)
    products = {FORWARD: 2, TRAINING: 7}[what]
    attention = products * 2 * CLIP.joint**2 * pair.width
    assert counter.get_total_flops() == blocks.work(pair)[what].num_flops - attention


def test_kept_memory_leaves_the_weights_out(pair):
    m = measured(pair, TRAINING)
    row = CLIP.joint * pair.width * 4 / 2**20
    # What the blocks keep, in rows, is held by tests/models/test_dit_memory.py.
    ours, theirs = (t.kept_mib / row for t in m.timings)
    assert 15 < ours < theirs < 40


def test_kernels_are_asked_for_by_name_until_all_are_verified(monkeypatch):
    assert blocks.by_name(CPU) is None
    kernel = SimpleNamespace(VERIFIED_ON=frozenset(), supports=lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "implementations", lambda op: {"reference": kernel})

    def clips():
        return {case.name for case in blocks.cases(torch.device("cuda"), quick=False)}

    context = blocks.by_name(torch.device("cuda"))
    x = torch.ones(2)
    with context():
        assert dispatch.select("gelu_tanh", x) is kernel
    assert dispatch.select("gelu_tanh", x) is not kernel
    assert clips() == {shapes.CLIP_256P_65.name}
    kernel.VERIFIED_ON = frozenset({"sm_90"})
    assert blocks.by_name(torch.device("cuda")) is None
    assert clips() == {shapes.CLIP_256P_65.name, shapes.CLIP_720P_129.name}


def test_a_gpu_times_the_block_with_every_kernel_of_attention(monkeypatch):
    assert blocks._with_each_attention(SimpleNamespace(device=CPU)) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pair = SimpleNamespace(device=torch.device("cuda"), ours=lambda: None)
    entrants = {each.name: each for each in blocks._with_each_attention(pair)}
    assert {"attention cudnn", "attention flash_attn_3", "attention reference"} <= set(entrants)
    q = torch.zeros(1, 4, 1, 8)
    with entrants["attention cpu_flash"].context():
        chosen = dispatch.select("rope3d_attention", q, q, q, None, 1.0)
        assert dispatch.name_of(chosen) == "library_impl.cpu_flash"
    with (
        entrants["attention cudnn"].context(),
        pytest.raises(RuntimeError, match=r"library_impl\.cudnn was asked for by name"),
    ):
        dispatch.select("rope3d_attention", q, q, q, None, 1.0)


def test_compiled_blocks_take_the_place_of_the_plain_ones(pair, monkeypatch):
    monkeypatch.setattr(blocks, "compiled", lambda call: lambda: compiled_now.append(call) or call)
    compiled_now = []
    entrants = blocks._case(pair, quick=False)
    for entrant in (entrants.ours[-1], entrants.peers[-1]):
        assert isinstance(entrant.build(), Weighted) and entrant.name.endswith(" compiled")
    assert len(compiled_now) == 2


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_a_gpu_compares_them_too():
    pytest.importorskip("diffusers")
    device = torch.device("cuda")
    setting = Setting(device, CudaClock(device), TWO_ROUNDS)
    for case in blocks.cases(device, quick=True):
        m = measure("dit_blocks", case, TRAINING, setting)
        assert {"hunyuan_fast", "diffusers"} <= {t.name for t in m.timings}
        assert all(t.peak_mib > 0 for t in m.timings)
