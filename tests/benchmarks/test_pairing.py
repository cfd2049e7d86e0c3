"""Interleaved rounds on a machine whose clock is a fake."""

import gc
from contextlib import contextmanager

import pytest

from benchmarks.kit.clock import HostClock
from benchmarks.kit.pairing import Entry, Rounds, paired_samples
from benchmarks.kit.statistics import paired_ratio, spread
from tests.benchmarks.fakes import FakeMachine

TEN = Rounds(budget=0.0, least=10, most=10)


def measure(machine, costs, rounds=TEN, min_sample_seconds=0.0):
    entries = {name: Entry(machine.work(name, cost)) for name, cost in costs.items()}
    clock = HostClock(now=machine.now, min_sample_seconds=min_sample_seconds)
    return paired_samples(entries, clock, rounds, now=machine.now)


def test_everyone_is_timed_in_every_round():
    samples = measure(FakeMachine(), {"a": 1.0, "b": 2.0}).seconds
    assert samples == {"a": [1.0] * 10, "b": [2.0] * 10}


def test_the_order_is_drawn_anew_for_each_round_and_is_the_same_every_time():
    logs = []
    for _ in range(2):
        machine = FakeMachine()
        measure(machine, {"a": 1.0, "b": 1.0, "c": 1.0}, Rounds(budget=0.0, least=40, most=40))
        logs.append("".join(machine.log))
    assert logs[0] == logs[1]
    # One call each to learn how long it takes, then the rounds.
    rounds = [logs[0][i : i + 3] for i in range(3, len(logs[0]), 3)]
    assert len(rounds) == 40 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    before_b = [each[each.index("b") - 1] for each in rounds if each.index("b")]
    assert set(before_b) == {"a", "c"}


def test_a_drifting_machine_does_not_move_the_ratio():
    machine = FakeMachine(slowdown=lambda time: 1.0 + time / 10)
    seconds = measure(machine, {"slow": 0.02, "fast": 0.01}).seconds
    assert seconds["fast"][-1] > seconds["fast"][0]
    assert paired_ratio(seconds["slow"], seconds["fast"]).median == pytest.approx(2.0, rel=0.01)


def test_pairing_sees_through_a_neighbour_that_two_medians_do_not():
    def slowdown(time: float) -> float:
        return 3.0 if time > 5.0 else 1.0

    machine = FakeMachine(slowdown)
    seconds = measure(machine, {"slow": 0.2, "fast": 0.1}, Rounds(0.0, 30, 30)).seconds
    ratio = paired_ratio(seconds["slow"], seconds["fast"])
    assert ratio.median == pytest.approx(2.0)

    # The same work measured one after the other: the neighbour hits the second only.
    machine = FakeMachine(slowdown)
    first = measure(machine, {"slow": 0.2}, Rounds(0.0, 30, 30)).seconds["slow"]
    second = measure(machine, {"fast": 0.1}, Rounds(0.0, 30, 30)).seconds["fast"]
    assert spread(first).median / spread(second).median == pytest.approx(2 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("rounds", "done"),
    [
        (Rounds(budget=0.0, least=4, most=50), 4),
        (Rounds(budget=6.5, least=1, most=50), 7),
        (Rounds(budget=1e9, least=1, most=20), 20),
    ],
)
def test_rounds_end_with_the_budget_within_their_limits(rounds, done):
    samples = measure(FakeMachine(), {"a": 0.5, "b": 0.5}, rounds).seconds
    assert len(samples["a"]) == len(samples["b"]) == done


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    samples = measure(FakeMachine(), {"short": 0.001, "long": 0.5}, min_sample_seconds=0.01)
    assert samples.calls == {"short": 10, "long": 1}
    assert samples.seconds["short"] == pytest.approx([0.001] * 10)


def test_a_sample_has_as_many_calls_as_are_asked_for():
    machine = FakeMachine()
    entries = {name: Entry(machine.work(name, 0.5), calls=n) for name, n in (("a", 1), ("b", 20))}
    clock = HostClock(now=machine.now, min_sample_seconds=0.01)
    samples = paired_samples(entries, clock, Rounds(0.0, 1, 1), now=machine.now)
    assert samples.calls == {"a": 1, "b": 20}
    assert samples.seconds["b"] == pytest.approx([0.5])


def test_contexts_are_entered_outside_of_the_clock():
    machine = FakeMachine()

    @contextmanager
    def slow_to_enter():
        machine.time += 100.0
        machine.log.append("in")
        yield
        machine.log.append("out")

    entries = {"a": Entry(machine.work("a", 1.0), slow_to_enter)}
    clock = HostClock(now=machine.now, min_sample_seconds=0.0)
    samples = paired_samples(entries, clock, Rounds(0.0, 2, 2), now=machine.now)
    assert samples.seconds["a"] == [1.0, 1.0]
    assert machine.log == ["in", "a", "out"] * 3


def test_the_garbage_collector_waits_and_comes_back_after_a_failure():
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("as planned")

    calls = iter([lambda: None, fail])
    entry = Entry(lambda: next(calls)())
    with pytest.raises(RuntimeError, match="as planned"):
        paired_samples({"a": entry}, HostClock(min_sample_seconds=0.0), TEN)
    assert gc.isenabled()
