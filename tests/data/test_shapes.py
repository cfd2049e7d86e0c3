"""The rendered training set: what scenes hold, what captions say, what pixels show."""

from itertools import combinations

import numpy as np
import pytest
import torch

from hunyuan_fast.data.shapes.batches import caption, clip, sample
from hunyuan_fast.data.shapes.caption import describe, plain, vocabulary
from hunyuan_fast.data.shapes.judge import judge
from hunyuan_fast.data.shapes.render import render, signed_distance
from hunyuan_fast.data.shapes.scene import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    TRAINED,
    is_held_out,
)


def test_the_split_holds_out_triples_but_no_pair():
    assert len(HELD_OUT) == 24 and len(TRAINED) == 96
    for first, second in combinations(range(3), 2):
        seen = {(triple[first], triple[second]) for triple in TRAINED}
        names = (COLOURS, SHAPES, DIRECTIONS)
        assert len(seen) == len(names[first]) * len(names[second])


def test_training_scenes_never_show_a_held_out_combination():
    pairs = 0
    for index in range(400):
        scene, _ = sample(11, index)
        pairs += len(scene.things) == 2
        assert not any(is_held_out(t.colour, t.shape, t.direction) for t in scene.things)
    assert 40 < pairs < 120


def test_a_sample_depends_on_its_number_alone():
    assert sample(5, 17) == sample(5, 17)
    assert sample(5, 17) != sample(5, 18) and sample(5, 17) != sample(6, 17)
    assert torch.equal(clip(5, 17), clip(5, 17))


def test_everything_stays_inside_the_frame():
    for index in range(60):
        scene, _ = sample(2, index)
        frames = render(scene).astype(int)
        border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
        assert np.ptp(border, axis=(0, 1)).max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_is_negative_inside_and_grows_outwards(shape):
    x = np.linspace(0, 40, 81, dtype=np.float32)
    distance = signed_distance(shape, 10.0, x, np.zeros_like(x))
    assert distance[0] < -2 and distance[-1] > 20
    outside = distance[distance > 0]
    assert (np.diff(outside) > 0).all()


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape must be circle, square, triangle or star"):
        signed_distance("hexagon", 1.0, np.zeros(1), np.zeros(1))


def test_captions_name_what_is_shown_in_known_words():
    words = set(vocabulary())
    texts = set()
    for index in range(200):
        scene, text = sample(9, index)
        assert set(text.split()) <= words
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in text
        texts.add(text)
    assert len(texts) > 190


def test_a_scene_has_many_phrasings_and_images_say_no_motion():
    phrasings = {caption(9, 4, variant=variant) for variant in range(30)}
    assert len(phrasings) > 15
    motions = {"moving", "moves", "still", "left", "right", "up", "down", "drifting", "sliding"}
    for variant in range(30):
        assert not motions & set(caption(9, 4, variant=variant, motion=False).split())


def test_plain_captions():
    assert plain("red", "circle", "right") == "a red circle moving right"
    assert plain("blue", "star", "still") == "a blue star standing still"
    scene, _ = sample(9, 0)
    assert describe(np.random.default_rng(0), scene)


@pytest.mark.parametrize("noise", [0.0, 10.0])
def test_the_judge_reads_rendered_clips_without_a_mistake(noise):
    rng = np.random.default_rng(5)
    for index in range(24):
        combination = (HELD_OUT + TRAINED)[index * 5]
        scene, _ = sample(7, index, combinations=(combination,), two_things=0)
        frames = render(scene) + rng.normal(0, noise, (17, 96, 96, 3))
        seen = judge(np.clip(frames, 0, 255).astype(np.uint8))
        assert (seen.colour, seen.shape, seen.direction) == combination
        assert seen.background == scene.background


def test_the_judge_sees_nothing_on_an_empty_background():
    frames = np.full((17, 96, 96, 3), 110, dtype=np.uint8)
    seen = judge(frames)
    assert seen.colour is None and seen.shape is None and seen.direction is None
    assert seen.background == "gray"
