"""Passes cut into horizontal strips: the values of the whole clip, in the memory of a strip."""

from dataclasses import replace

import pytest
import torch

from hunyuan_fast.models.vae.cost import SLACK
from hunyuan_fast.models.vae.film import Film
from hunyuan_fast.models.vae.layers import Layer, layers_of
from hunyuan_fast.models.vae.planner import least_budget, plan_decode, plan_encode
from hunyuan_fast.models.vae.streaming import stream
from hunyuan_fast.models.vae.strips import course, strips
from tests.models.vae_cases import clip, never_whole, tiny_vae
from tests.models.vae_memory import LiveBytes

PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch):
    never_whole(monkeypatch)


def in_strips(plan, count, frames=None):
    """The plan with all passes but the attention in so many strips, in chunks of so many frames."""
    layers = layers_of(plan.config, plan.half)

    def cut(segment):
        if layers[segment.start].attends:
            return segment
        passes = [
            replace(step, strips=count, frames=frames or step.frames) for step in segment.passes
        ]
        return replace(segment, passes=tuple(passes))

    return replace(plan, segments=tuple(map(cut, plan.segments)))


def test_strips_are_all_rows():
    assert strips(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert strips(5, 5) == [(n, n + 1) for n in range(5)]
    assert strips(9, 1) == [(0, 9)]


@pytest.mark.parametrize("height", [7, 8])
@pytest.mark.parametrize(
    "layer",
    [
        Layer("", 1, 1),
        Layer("", 1, 1, kernel=1),
        Layer("", 1, 1, stride=(1, 2, 2)),
        Layer("", 1, 1, factor=(2, 2, 2)),
    ],
)
def test_rows_that_a_layer_reads(layer, height):
    """By what each row of the result is made of, found one by one."""
    factor, stride, reach = layer.factor[1], layer.stride[1], layer.kernel // 2
    made = layer.size((1, height, 1))[1]
    for first in range(made):
        for stop in range(first + 1, made + 1):
            seen = {
                min(max(row * stride + tap, 0), height * factor - 1) // factor
                for row in range(first, stop)
                for tap in range(-reach, reach + 1)
            }
            low, high = layer.reads((first, stop), height)
            assert low % stride == 0
            assert min(seen) - low in (range(stride) if first else (0,))
            assert high == max(seen) + 1
            top, bottom = layer.makes((low, high))
            assert top <= first and stop <= bottom <= made


def test_halos_are_cut_before_they_multiply():
    layers = [Layer("", 1, 1), Layer("", 1, 1, factor=(1, 2, 2)), Layer("", 1, 1)]
    way = course(layers, [20, 20, 40, 40], (10, 20))
    assert way.came == ((3, 12), (3, 12), (8, 22), (8, 22))
    assert way.used == ((3, 12), (4, 11), (8, 22), (10, 20))
    assert [way.cut(place) for place in range(4)] == [None, slice(1, 8), None, slice(2, 12)]
    assert course(layers, [20, 20, 40, 40], (0, 40)).cut(1) is None


# latents of odd heights among them, and strips whose halos meet all rows
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"),
    [(1, 1, 56, 24), (2, 5, 40, 16), (1, 9, 72, 16), (1, 17, 24, 40)],
)
@pytest.mark.parametrize(("count", "length"), [(2, None), (3, 1), (3, 2)])
def test_strips_give_the_whole_clip(generator, poison, batch, frames, height, width, count, length):
    vae = tiny_vae(generator).requires_grad_(False)
    video = clip(generator, batch, 3, frames, height, width)
    z = torch.randn(batch, 4, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    for half, planned, x in (("encode", plan_encode, video), ("decode", plan_decode, z)):
        least = least_budget(half, vae.config, x.shape, torch.float32)
        whole = stream(vae, planned(vae.config, x.shape, torch.float32, PLENTY), x)
        for budget in (least, SLACK + 2 * (least - SLACK), PLENTY):
            plan = planned(vae.config, x.shape, torch.float32, budget)
            found = stream(vae, in_strips(plan, count, length), x)
            torch.testing.assert_close(found, whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_strips_keep_to_the_plan(generator, half):
    """A clip so high that the least budget cuts it."""
    vae = tiny_vae(generator).requires_grad_(False)
    shape = (1, 3, 9, 256, 32) if half == "encode" else (1, 4, 3, 32, 4)
    x = 2 * torch.rand(shape, generator=generator) - 1
    planned = plan_encode if half == "encode" else plan_decode
    least = least_budget(half, vae.config, shape, torch.float32)
    whole = stream(vae, planned(vae.config, shape, torch.float32, PLENTY), x)
    counts = set()
    for factor in (1, 1.2, 1.5, 2):
        plan = planned(vae.config, shape, torch.float32, SLACK + int(factor * (least - SLACK)))
        counts |= {step.strips for segment in plan.segments for step in segment.passes}
        with LiveBytes() as used:
            found = stream(vae, plan, x)
        assert 0.5 * (plan.peak - SLACK) < used.peak <= plan.peak - SLACK
        torch.testing.assert_close(found, whole, atol=5e-5, rtol=0)
    assert len(counts) > 2 and "in up to" in plan.summary()


def test_progress_in_strips(generator):
    vae = tiny_vae(generator).requires_grad_(False)
    z = torch.randn(1, 4, 3, 6, 2, generator=generator)
    plan = plan_decode(vae.config, z.shape, torch.float32, PLENTY)
    seen = []
    stream(vae, in_strips(plan, 3), z, seen.append)
    assert seen == sorted(seen) and seen[0] > 0
    assert seen[-1] == pytest.approx(1)


@pytest.mark.parametrize("parked", [False, True])
def test_a_film_is_filled_strip_by_strip(generator, parked):
    film = Film(parked=parked)
    x = torch.randn(1, 2, 3, 7, 3, generator=generator)
    for rows in strips(7, 3):
        for start, stop in ((0, 2), (2, 3)):
            film.fill(start, rows, 7, x[:, :, start:stop, slice(*rows)])
    assert len(film) == 3
    assert torch.equal(film.read(0, 3, last=False), x)
    assert torch.equal(film.read(1, 3, last=False, rows=(2, 6)), x[:, :, 1:3, 2:6])
    film.read(0, 1, last=True)
    with pytest.raises(AssertionError, match="written after it had been given up"):
        film.fill(0, (0, 7), 7, x[:, :, :1])
