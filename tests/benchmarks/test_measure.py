"""One measurement: who takes part, what is compared, and what the figures are relative to."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.bench_fused_modulation import _case
from benchmarks.kit import floor
from benchmarks.kit.alternate import alternate
from benchmarks.kit.case import (
    FORWARD,
    PASSES,
    TRAINING,
    Case,
    Entrant,
    Peer,
    Unavailable,
    Weighted,
    Work,
)
from benchmarks.kit.clock import HostClock
from benchmarks.kit.contenders import OURS, PEER, Contender
from benchmarks.kit.floor import COMPUTE, COPY, MATMUL, MEMORY, Probe, floor_probes, floors
from benchmarks.kit.measure import (
    Setting,
    Trial,
    best_peer,
    least_cosine,
    measure,
    relative_difference,
    timings,
)
from benchmarks.kit.pairing import Entry, Rounds, Samples
from benchmarks.kit.running import Bound, Inputs
from benchmarks.kit.statistics import Spread
from benchmarks.kit.summary import answering
from benchmarks.kit.table import cosines
from hunyuan_fast import dispatch
from tests.benchmarks.fakes import FakeMachine

OP = "fused_modulation"
CPU = torch.device("cpu")


def eager(x, shift, scale):
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


def wrong(x, shift, scale):
    return eager(x, shift, scale) * 1.1


def fail(x, shift, scale):
    raise RuntimeError("no kernel for this\nand a long explanation")


def setting(clock: HostClock | None = None) -> Setting:
    """Two rounds, and time for everyone."""
    clock = clock or HostClock(cache_bytes=1, min_sample_seconds=0.0)
    return Setting(CPU, clock, Rounds(budget=1e3, least=2, most=2))


def small(*peers: Peer, dtype: torch.dtype = torch.float32) -> Case:
    return replace(_case("small", 12, 32, dtype), peers=peers)


def peer(name: str, call=eager, **more) -> Peer:
    return Peer(name, lambda: call, **more)


@pytest.mark.parametrize("what", PASSES)
def test_ours_and_peers_are_timed_together(what):
    m = measure(OP, small(peer("eager")), what, setting())
    names = {t.name: t for t in m.timings}
    assert {"reference", "eager"} <= names.keys()
    assert names["reference"].kind == OURS and names["eager"].kind == PEER
    assert sum(t.answers for t in m.timings) == 1
    assert m.best_peer == "eager" and names["eager"].speedup == Spread(1.0, 1.0, 1.0)
    assert all(t.rounds == 2 and t.difference < 1e-5 for t in m.timings)


def test_every_implementation_is_timed_or_says_why_not():
    m = measure(OP, small(), FORWARD, setting())
    assert {t.name for t in m.timings} | m.declined.keys() == set(
        dispatch.explain(OP, *small().arguments(*_inputs(small())))
    )
    assert all(m.declined.values())
    assert m.best_peer is None and all(t.speedup is None for t in m.timings)


def test_the_interpreter_of_triton_is_never_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    m = measure(OP, small(), FORWARD, setting())
    assert "triton_impl" not in {t.name for t in m.timings}


@pytest.mark.parametrize("what", PASSES)
def test_a_peer_that_computes_something_else_is_left_out(what):
    m = measure(OP, small(peer("wrong", wrong), peer("eager")), what, setting())
    assert "computes something else" in m.declined["wrong"]
    assert m.best_peer == "eager"


def test_a_peer_that_fails_is_left_out_with_its_first_line():
    m = measure(OP, small(peer("broken", fail)), FORWARD, setting())
    assert m.declined["broken"] == "RuntimeError: no kernel for this"


def test_a_peer_that_is_not_here_says_why():
    def build():
        raise Unavailable("liger_kernel is not installed")

    m = measure(OP, small(Peer("liger", build)), FORWARD, setting())
    assert m.declined["liger"] == "liger_kernel is not installed"


def test_a_peer_that_fails_before_it_is_called_is_left_out_too():
    m = measure(OP, small(Peer("broken", fail), peer("eager")), FORWARD, setting())
    assert m.declined["broken"].startswith(("RuntimeError: ", "TypeError: "))
    assert m.best_peer == "eager"


def test_a_peer_too_slow_to_repeat_is_left_out():
    clock = HostClock(cache_bytes=1, min_sample_seconds=0.0)

    def sleepy(x, shift, scale):
        offset[0] += 5.0
        return eager(x, shift, scale)

    offset, real = [0.0], clock.now
    clock.now = lambda: real() + offset[0]
    rounds = Rounds(budget=4.0, least=2, most=2)
    m = measure(OP, small(peer("sleepy", sleepy)), FORWARD, replace(setting(clock), rounds=rounds))
    assert m.declined["sleepy"].startswith("too slow: one call takes 5 s")


def test_who_answers_is_left_out_as_well_when_far_behind_another_of_ours():
    """On a GPU without verified kernels the reference answers, and may take minutes."""
    clock = HostClock(cache_bytes=1, min_sample_seconds=0.0)

    def plain(x, shift, scale):
        offset[0] += 5.0
        return eager(x, shift, scale)

    offset, real = [0.0], clock.now
    clock.now = lambda: real() + offset[0]
    case = own(Entrant("plain", lambda: plain), Entrant("kernel", lambda: eager))
    rounds = Rounds(budget=4.0, least=2, most=2)
    m = measure("whole", case, FORWARD, replace(setting(clock), rounds=rounds))
    assert m.declined["plain"].startswith("too slow: one call takes 5 s")
    assert [(t.name, t.answers) for t in m.timings if t.kind == OURS] == [("kernel", False)]


def test_an_implementation_of_ours_that_is_wrong_stops_the_measurement():
    case = small()
    calls = iter(range(100))

    def call(x, shift, scale):
        # One call to learn the shape, two of the reference, then the first of cpu_impl.
        return case.call(x, shift, scale) * (1.0 if next(calls) < 3 else 2.0)

    if "cpu_impl" not in dispatch.implementations(OP):
        pytest.skip("only the reference is here")
    with pytest.raises(RuntimeError, match=r"cpu_impl is wrong in small forward: relative diff"):
        measure(OP, replace(case, call=call), FORWARD, setting())


def own(*ours: Entrant) -> Case:
    """A case of no op: our own ways to the result, and one peer."""
    return replace(small(peer("eager")), arguments=None, ours=ours)


def test_without_an_op_the_first_of_ours_answers_and_others_may_fail():
    def build():
        raise Unavailable("no compiler")

    others = (Entrant("broken", lambda: fail), Entrant("missing", build))
    m = measure("whole", own(Entrant("plain", lambda: eager), *others), FORWARD, setting())
    assert [(t.name, t.kind, t.answers) for t in m.timings] == [
        ("plain", OURS, True),
        ("eager", PEER, False),
    ]
    assert m.declined == {
        "broken": "RuntimeError: no kernel for this",
        "missing": "no compiler",
    }
    with pytest.raises(RuntimeError, match="no kernel for this"):
        measure("whole", own(Entrant("plain", lambda: fail)), FORWARD, setting())
    broken = own(Entrant("plain", lambda: fail), *others[:1])
    with pytest.raises(
        RuntimeError, match=r"none of ours can do small forward.*no kernel for this"
    ):
        measure("whole", broken, FORWARD, setting())
    twice = own(Entrant("plain", lambda: eager), Entrant("off", lambda: wrong))
    with pytest.raises(RuntimeError, match="whole: off is wrong in small forward"):
        measure("whole", twice, FORWARD, setting())


def test_where_the_first_is_asked_for_by_name_none_answers():
    def context():
        return nullcontext()

    named = [Entrant(name, lambda: eager, context) for name in ("broken", "slow", "fast")]
    named[0] = replace(named[0], build=lambda: fail)
    m = measure("whole", own(*named), FORWARD, setting())
    assert [t.name for t in m.timings if t.kind == OURS] == ["slow", "fast"]
    assert not any(t.answers for t in m.timings) and "broken" in m.declined
    quicker = replace(m.timings[1], ms=Spread(1e-3, 1e-3, 1e-3))
    assert answering(replace(m, timings=[m.timings[0], quicker])).name == "fast"


def test_weights_are_differentiated_compared_and_not_counted_as_kept():
    weight = torch.randn(12, 32, requires_grad=True)
    halves = tuple(half.detach().requires_grad_() for half in weight.split(6))

    def whole(x, shift, scale):
        return eager(x, shift, scale) * weight

    def split(x, shift, scale):
        return eager(x, shift, scale) * torch.cat(halves)

    def joined(gradients):
        return [torch.cat(list(gradients))]

    ours = Entrant("ours", lambda: Weighted(whole, (weight,), tuple))
    peers = (
        Peer("theirs", lambda: Weighted(split, halves, joined)),
        Peer("swapped", lambda: Weighted(split, halves[::-1], joined)),
    )
    case = replace(own(ours), peers=peers)
    m = measure("whole", case, TRAINING, setting())
    assert [t.name for t in m.timings] == ["ours", "theirs"]
    assert "computes something else" in m.declined["swapped"]
    rows = [t.kept_mib * 2**20 / (12 * 32 * 4) for t in m.timings]
    # x, its norm, what the weight multiplies, small statistics; the joined halves on top
    assert rows[1] - rows[0] == pytest.approx(1.0) and 2 < rows[0] < 4
    assert all(t.kept_mib is None for t in measure("whole", case, FORWARD, setting()).timings)


def test_contexts_surround_the_calls_of_their_peer_alone():
    inside = []

    @contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def call(x, shift, scale):
        assert inside
        return eager(x, shift, scale)

    m = measure(OP, small(peer("with", call, context=context), peer("eager")), FORWARD, setting())
    assert {"with", "eager"} <= {t.name for t in m.timings} and not inside


def test_gradients_are_compared_only_where_they_mean_something():
    def first_half(x):
        return torch.cat((x[:, :6], torch.zeros_like(x[:, 6:])), dim=1)

    def junk_behind(x, shift, scale):
        y = eager(x, shift, scale)
        return torch.cat((y[:, :6], y[:, 6:] * 3), dim=1)

    case = replace(small(peer("junk behind", junk_behind)), meaningful=first_half)
    for what in PASSES:
        assert "junk behind" not in measure(OP, case, what, setting()).declined


def test_cold_inputs_are_larger_than_the_cache_together():
    case = small()
    tensors = sum(t.numel() for t in _inputs(case)) * 4
    inputs = Inputs(case, CPU, HostClock(cache_bytes=2 * tensors), seed=0)
    assert len(inputs.sets) * tensors > 2 * tensors
    places = {t.data_ptr() for tensors in inputs.sets for t in tensors}
    assert len(places) == 3 * len(inputs.sets)
    assert all(
        torch.equal(a, b) for s in inputs.sets for a, b in zip(s, inputs.sets[0], strict=True)
    )
    assert all(t.requires_grad for s in inputs.sets for t in s)

    warm = Inputs(replace(case, cold=False), CPU, HostClock(cache_bytes=2 * tensors), seed=0)
    assert len(warm.sets) == 1


def test_contenders_share_one_cycle_of_inputs():
    case = small()
    inputs = Inputs(case, CPU, HostClock(cache_bytes=1 << 20), seed=0)
    seen = []

    def note(x, *_):
        seen.append(x.data_ptr())
        return x

    first, second = (Bound(note, FORWARD, inputs) for _ in range(2))
    for _ in range(len(inputs.sets)):
        first()
        second()
    places = [s[0].data_ptr() for s in inputs.sets]
    assert len(places) > 2 and seen == 2 * places


def test_the_best_peer_has_the_lowest_median_and_ratios_are_within_rounds():
    ready = [Contender(n, k, eager) for n, k in (("ours", OURS), ("a", PEER), ("b", PEER))]
    seconds = {"ours": [1.0, 4.0, 1.0], "a": [2.0, 8.0, 2.0], "b": [3.0, 3.0, 3.0]}
    samples = Samples(seconds, dict.fromkeys(seconds, 1))
    assert best_peer(ready, samples) == "a"
    trials = dict.fromkeys(seconds, Trial(0.0, 1.0))
    peaks = dict.fromkeys(seconds, 1.0)
    kept = {**dict.fromkeys(seconds), "ours": 2.0}
    ours, a, _ = timings(ready, trials, peaks, kept, samples, floor=[0.5, 2.0, 0.5])
    assert ours.speedup == Spread(2.0, 2.0, 2.0) and a.speedup == Spread(1.0, 1.0, 1.0)
    assert ours.of_floor == Spread(0.5, 0.5, 0.5) and ours.ms.median == 1000.0
    assert ours.peak_mib == 1.0 and ours.kept_mib == 2.0 and a.kept_mib is None


def test_the_higher_floor_counts():
    probes = {COPY: Probe(Entry(print), 100.0), MATMUL: Probe(Entry(print), 1000.0)}
    seconds = {COPY: [1.0, 2.0], MATMUL: [1.0, 1.0]}
    assert floors(probes, seconds, Work(200, 1000)) == ([2.0, 4.0], MEMORY)
    assert floors(probes, seconds, Work(100, 5000)) == ([5.0, 5.0], COMPUTE)
    assert floors({COPY: probes[COPY]}, seconds, Work(50)) == ([0.5, 1.0], MEMORY)


def test_probes_do_the_work_that_they_claim():
    case = small()
    probes = floor_probes(case, Work(1000), CPU, copies=2)
    assert list(probes) == [COPY] and probes[COPY].amount == 1000
    probes = floor_probes(case, Work(1000, 1), CPU, copies=1)
    assert probes[MATMUL].amount == 2 * probes[MATMUL].entry.run().shape[0] ** 3


def test_a_copy_is_not_larger_than_it_needs_to_be(monkeypatch):
    monkeypatch.setattr(floor, "_MOST_COPIED", 4000)
    probes = floor_probes(small(), Work(10**12), CPU, copies=1)
    assert probes[COPY].amount == 4000
    # the floor is that of all bytes nevertheless
    assert floors(probes, {COPY: [2.0]}, Work(10**12)) == ([2.0 * 10**12 / 4000], MEMORY)


def test_cosine_is_told_of_results_that_are_others_by_design():
    m = measure(OP, small(peer("eager"), peer("other", wrong, same=False)), FORWARD, setting())
    found = {t.name: t for t in m.timings}
    assert found["other"].cosine == pytest.approx(1.0) and found["other"].difference > 0.05
    assert found["eager"].cosine is None
    assert cosines(m) == "cosine to reference: other 1.00000 (difference 0.1)"
    assert math.isnan(least_cosine([torch.ones(2)], [torch.zeros(2)]))
    turned = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])]
    assert least_cosine(turned, [torch.tensor([1.0, 0.0])] * 2) == pytest.approx(0.5**0.5)


def test_long_calls_are_told_at_once_and_stop_when_the_time_is_up(monkeypatch):
    machine = FakeMachine()

    def now():
        machine.time += 1e-3  # so that nothing takes no time at all
        return machine.time

    monkeypatch.setattr("benchmarks.kit.measure.time.monotonic", now)

    def slow(x, shift, scale):
        machine.time += 100.0
        return eager(x, shift, scale)

    def entrant(kind, name):
        return kind(name, lambda: slow)

    told = []
    clock = HostClock(now=now, cache_bytes=1, min_sample_seconds=0.0)
    rounds = Rounds(budget=700.0, least=1, most=1)
    case = replace(
        small(*(entrant(Peer, name) for name in ("one", "two", "three"))),
        arguments=None,
        ours=(entrant(Entrant, "ours"),),
        rounds=rounds,
        once=True,
    )
    m = measure(OP, case, FORWARD, Setting(CPU, clock, rounds, told=told.append))
    # Before the last one 300 s are spent; a round takes 300 more, and two calls of another one 200.
    assert [t.name for t in m.timings] == ["ours", "one", "two"]
    assert m.declined == {"three": "no time is left for it, after 300 s"}
    assert told == [f"{name}: 100.00 s at first" for name in ("ours", "one", "two")]
    assert all(t.rounds == 1 for t in m.timings)


def test_relative_difference_is_of_the_worst_tensor():
    truth = [torch.ones(4), torch.full((4,), 100.0)]
    assert relative_difference([truth[0] + 0.5, truth[1] + 1.0], truth) == pytest.approx(0.5)
    assert relative_difference([truth[0] * torch.nan, truth[1]], truth) != pytest.approx(0.0)
    assert relative_difference([torch.ones(3)], [torch.zeros(3)]) == pytest.approx(1.0)


def test_taking_turns_is_measured_for_ours_and_the_first_peer():
    ours, first = alternate(OP, small(peer("eager"), peer("other")), setting())
    assert (ours.kind, first.name) == (OURS, "eager")
    assert ours.ratio.low > 0 and ours.companion == "gelu"


def _inputs(case: Case):
    return case.inputs(torch.Generator().manual_seed(0))
