"""The recipe of the miniature, cut to a few steps: it ends in a pipeline, and resumes exactly."""

import json
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_fast.data.shapes.render import render
from hunyuan_fast.data.shapes.scene import HELD_OUT, sample_scene
from hunyuan_fast.pipelines import HunyuanVideoPipeline
from hunyuan_fast.trainer.nano import NanoRecipe, recipe, train
from hunyuan_fast.trainer.nano.evaluate import (
    accuracy,
    held_out_prompts,
    reconstruction_psnr,
    run_trials,
)

TINY = NanoRecipe(
    threads=1,
    vae_image_steps=1,
    vae_short_steps=1,
    vae_full_steps=1,
    num_clips=10,
    num_images=10,
    llm_steps=2,
    clip_steps=2,
    dit_image_steps=1,
    dit_clip_steps=2,
    guidance_steps=1,
    text_batch=8,
    trial_prompts=1,
)
SIZE = 48


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module", autouse=True)
def _small_clips_in_small_batches() -> Iterator[None]:
    """What a run is about does not depend on sizes; its time does."""

    def psnr_of_one(vae, *, seed, count):
        return reconstruction_psnr(vae, seed=seed, count=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "SIZE", SIZE)
        flow = partial(recipe.FlowConfig, image_batch=4, clip_batch=4)
        patch.setattr(recipe, "FlowConfig", flow)
        patch.setattr(recipe, "DistillationConfig", partial(recipe.DistillationConfig, batch=4))
        # its name in the package is that of the function
        module = import_module("hunyuan_fast.trainer.nano.train")
        patch.setattr(module, "reconstruction_psnr", psnr_of_one)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("nano") / "whole"
    stages = []
    folder = train(TINY, out, progress=lambda stage, *_: stages.append(stage))
    return folder, list(dict.fromkeys(stages))


def test_the_stages_run_in_order(whole):
    stages = ["vae", "encode clips", "encode images", "llm", "clip", "dit", "guidance", "trials"]
    assert whole[1] == stages


def test_the_run_ends_with_its_figures_and_curves(whole):
    out = whole[0].parent
    figures = json.loads((out / "figures.json").read_text())
    assert set(figures["held_out_prompts"]) == {"colour", "shape", "direction", "all"}
    assert 0 < figures["held_out_psnr"] < 60
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_is_a_pipeline_that_generates(whole):
    pipe = HunyuanVideoPipeline.from_pretrained(whole[0])
    video = pipe("a red circle moving right", num_inference_steps=1)
    assert video.shape == (1, 17, SIZE, SIZE, 3) and video.dtype == torch.uint8
    assert not torch.equal(video, pipe("a blue star", num_inference_steps=1, seed=1))


@pytest.mark.parametrize("stop", ["encode images", "dit", "trials"])
def test_an_interrupted_recipe_ends_in_the_same_weights(whole, stop, tmp_path):
    def interrupt(stage, *_):
        if stage == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", progress=interrupt)
    folder = train(TINY, tmp_path / "run", resume=True)
    assert weights(folder) == weights(whole[0])


def test_a_finished_run_is_returned_as_it_is(whole):
    before = weights(whole[0])
    stages = []
    folder = train(
        TINY, whole[0].parent, resume=True, progress=lambda stage, *_: stages.append(stage)
    )
    assert folder == whole[0] and weights(folder) == before and not stages


def test_a_run_is_neither_overwritten_nor_mixed_with_another(whole, tmp_path):
    out = whole[0].parent
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        train(TINY, out)
    with pytest.raises(ValueError, match="another recipe"):
        train(NanoRecipe(seed=1), out, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(TINY, tmp_path / "nothing", resume=True)
    assert json.loads((out / "recipe.json").read_text())["seed"] == 0


def test_trials_compare_what_was_asked_with_what_is_seen():
    """A generator that draws what it is told is always right; one of red squares is not."""
    prompts = held_out_prompts(48)
    wanted = dict(prompts)

    def draw(combination):
        rng = np.random.default_rng(1)
        scene = sample_scene(rng, combinations=(combination,), two_things=0.0)
        return torch.from_numpy(render(scene))

    honest = run_trials(
        lambda prompt, *, seed: torch.stack([draw(wanted[text]) for text in prompt]), prompts
    )
    assert accuracy(honest) == {"colour": 1.0, "shape": 1.0, "direction": 1.0, "all": 1.0}

    stubborn = run_trials(
        lambda prompt, *, seed: torch.stack([draw(("red", "square", "up"))] * len(prompt)), prompts
    )
    shares = accuracy(stubborn)
    reds = sum(combination[0] == "red" for _, combination in prompts)
    assert shares["colour"] == pytest.approx(reds / 48)
    assert shares["all"] < 0.1


def test_held_out_prompts_are_held_out_and_varied():
    prompts = held_out_prompts(96)
    assert {combination for _, combination in prompts} == set(HELD_OUT)
    assert len({text for text, _ in prompts}) > 85
