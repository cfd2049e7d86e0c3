"""Layouts and predictions behave as they must: plausible, monotone, explained, quick."""

import time
from dataclasses import replace

import pytest

from hunyuan_fast.planning.hardware import GPUS
from hunyuan_fast.planning.layouts import Layout, geometries, objections, states
from hunyuan_fast.planning.memory import memory
from hunyuan_fast.planning.published import check_official, fitted_attention_tflops
from hunyuan_fast.planning.search import search
from hunyuan_fast.planning.timing import Clock
from hunyuan_fast.planning.work import Job, released

H100 = GPUS["h100"]
VIDEO = released(720, 1280, 129)
STEP = released(720, 1280, 129, training=True, videos=64)


@pytest.mark.parametrize(
    ("layout", "job", "said"),
    [
        (Layout(tp=5), VIDEO, "tp 5 does not divide the 24 heads"),
        (Layout(ulysses=16, tp=2), VIDEO, "ulysses 16 is more than the 12 heads of each GPU"),
        (Layout(dp=2), VIDEO, "dp 2 is more than the 1 videos"),
        (Layout(dp=128), STEP, "dp 128 is more than the 64 samples of a step"),
        (Layout(ring=200_000), VIDEO, "cp 200000 is more than the 118800 tokens"),
        (Layout(sequence_parallel=True), VIDEO, "tp is 1"),
        (Layout(zero=3), VIDEO, "zero 3 shards over dp x cp, and that is one GPU"),
        (Layout(ring=2, zero=1), VIDEO, "zero 1 shards what only training has"),
        (Layout(recompute=True), VIDEO, "nothing is kept for a backward pass"),
        (Layout(ring=2, zero=2, offload=True), STEP, "offload is for weights that are sharded"),
    ],
)
def test_what_cannot_be_says_why(layout: Layout, job: Job, said: str) -> None:
    assert any(said in sentence for sentence in objections(layout, job))


@pytest.mark.parametrize("job", [VIDEO, replace(STEP, videos=3)], ids=["video", "step"])
def test_all_that_is_tried_can_be(job: Job) -> None:
    tried = [layout for g in geometries(job, 24) for layout in states(g, job)]
    assert len(set(tried)) == len(tried) > 50
    for layout in tried:
        assert not objections(layout, job) and layout.gpus <= 24


@pytest.mark.parametrize("gpus", [0, 4097])
def test_other_numbers_of_gpus_are_refused(gpus: int) -> None:
    with pytest.raises(ValueError, match=f"gpus must be from 1 to 4096, got {gpus}"):
        list(geometries(VIDEO, gpus))


def test_sharding_saves_memory() -> None:
    stages = [memory(Layout(ring=8, zero=zero, recompute=True), STEP).total for zero in range(4)]
    assert stages == sorted(stages, reverse=True) and stages[3] < stages[0] / 2
    sizes = [memory(Layout(dp=n, zero=3, recompute=True), STEP).states for n in (2, 4, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)
    for job in (VIDEO, STEP):
        shared = [memory(Layout(ring=ring, zero=3), job).total for ring in (2, 4, 8, 16)]
        assert shared == sorted(shared, reverse=True)
    assert memory(Layout(ring=2, zero=3, offload=True), VIDEO).weights == 0
    plain, split = (memory(Layout(tp=8, sequence_parallel=s), STEP).kept for s in (False, True))
    assert split < plain


def test_recomputing_trades_time_for_memory() -> None:
    clock = Clock(STEP, H100)
    kept, again = Layout(ring=8, zero=3), Layout(ring=8, zero=3, recompute=True)
    assert memory(again, STEP).total < memory(kept, STEP).total / 3
    ratio = clock.step(again).total / clock.step(kept).total
    assert 1.2 < ratio < 1.35  # one forward pass of a step that is 3.5 of them


@pytest.mark.parametrize("job", [VIDEO, STEP], ids=["video", "step"])
def test_more_gpus_are_never_slower(job: Job) -> None:
    times = []
    for n in (1, 2, 3, 4, 6, 8, 11, 16, 32, 64):
        best = search(job, GPUS["h200"], n, top=1, explain=False).best
        times += [best[0].seconds.total] if best else []
    assert len(times) > 5
    assert times == sorted(times, reverse=True)


def test_tensor_parallelism_beyond_the_node_is_punished() -> None:
    clock = Clock(VIDEO, H100)
    node, beyond = (clock.step(Layout(tp=n, sequence_parallel=True)) for n in (8, 12))
    assert beyond.tp > 1.8 * node.tp
    assert beyond.tp / beyond.total > 2 * node.tp / node.total
    for choice in search(VIDEO, H100, 64, top=5).best:
        assert choice.layout.tp <= 8


def test_a_ring_hides_behind_attention_until_there_is_too_little_of_it() -> None:
    clock = Clock(VIDEO, H100)
    assert clock.step(Layout(ring=8)).ring == 0
    assert clock.step(Layout(ring=512)).ring > 0.5 * clock.step(Layout(ring=512)).total


def test_one_gpu_is_the_sum_of_its_parts() -> None:
    """Attention at 693 TFLOP/s and matrices at 790: 15.1 s and 2.05 s."""
    seconds = Clock(VIDEO, H100).step(Layout())
    assert seconds.attention == pytest.approx(15.1, abs=0.1)
    assert seconds.matrices == pytest.approx(2.05, abs=0.05)
    assert seconds.exposed == 0


def test_what_fits_and_what_does_not() -> None:
    assert search(VIDEO, H100, 1).best[0].layout == Layout()
    nothing = search(VIDEO, GPUS["4090"], 1)
    assert not nothing.best and nothing.least.total > GPUS["4090"].usable
    assert search(VIDEO, GPUS["4090"], 8).best[0].layout.zero == 3
    training = search(STEP, H100, 8)
    assert training.best[0].layout.recompute
    assert all(choice.memory.total <= H100.usable for choice in training.best)
    assert any("GiB of 74" in each.reason for each in training.rejected)


def test_plain_layouts_are_explained() -> None:
    reasons = {each.layout: each.reason for each in search(VIDEO, H100, 64).rejected}
    assert "some would have nothing" in reasons[Layout(dp=64)]
    assert "more than the 24 heads" in reasons[Layout(ulysses=64)]
    assert "times as long" in reasons[Layout(ring=64)]
    assert "hops of the ring" in reasons[Layout(ring=64)]


@pytest.mark.parametrize(
    "job", [VIDEO, STEP, replace(STEP, videos=4096)], ids=["video", "64", "4096"]
)
def test_four_thousand_gpus_are_searched_in_seconds(job: Job) -> None:
    started = time.process_time()
    found = search(job, H100, 4096)
    assert time.process_time() - started < 5
    assert found.best and found.idle >= 0


def test_the_published_table() -> None:
    """docs/plan.md tells these errors; the fit touches the first row alone."""
    rows = check_official()
    assert [row.gpus for row in rows] == [1, 2, 4, 8]
    assert rows[0].fitted == pytest.approx(rows[0].published)
    assert 300 < fitted_attention_tflops() < 370
    assert all(-0.25 < row.error < 0 for row in rows)
    assert all(abs(row.fitted_error) < 0.15 for row in rows)
