"""A pipeline over several processes makes the videos of one."""

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import generate_cases
from tests.kit.pipeline import tiny_pipeline
from tests.kit.ranks import RankPool


def shared_inputs(found: list[dict[str, Any]]) -> None:
    """All that these ranks gave to the transformer is the same, bit for bit."""
    first = found[0]["calls"]
    for other in found[1:]:
        assert len(other["calls"]) == len(first) > 0
        for one, two in zip(first, other["calls"], strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                assert torch.equal(value, two[name]), name


def difference(found: list[dict[str, Any]], expected: Tensor) -> float:
    """Of what rank 0 has; the others have nothing."""
    assert all(rank["made"].numel() == 0 for rank in found[1:])
    made = found[0]["made"]
    assert made.shape == expected.shape and made.dtype == expected.dtype
    return float((made - expected).abs().max())


@pytest.mark.parametrize(
    ("world", "layout", "output_type"),
    [
        (2, {"cp": 2}, "float"),
        (3, {"cp": 3}, "float"),
        (2, {"cp": 2, "ulysses": 2}, "latent"),
        (2, {"dp": 2}, "float"),
        (2, {"tp": 2}, "float"),
        (2, {"dp": 2, "zero": 3}, "latent"),
        (2, {"cp": 2, "zero": 3, "offload": True}, "latent"),
        (4, {"dp": 2, "cp": 2}, "latent"),
        (4, {"cp": 2, "tp": 2, "zero": 3}, "float"),
    ],
)
def test_the_videos_of_one_process(
    world: int, layout: dict[str, Any], output_type: str, ranks: RankPool
) -> None:
    """Also when the ranks are given different seeds, prompts and guidance."""
    others = {"seed": 99, "prompt": ["something", "else"], "num_inference_steps": 3}
    changes = [{"output_type": output_type}, *({**others, "seed": rank} for rank in range(1, 4))]
    found = ranks.run(world, generate_cases.together, layout, changes[:world])
    assert difference(found, generate_cases.alone(output_type=output_type)) <= 1e-4
    per_video = world // layout.get("dp", 1)
    for first in range(0, world, per_video):
        group = found[first : first + per_video]
        shared_inputs(group)
        assert [rank["text on"] for rank in group] == ["cpu", *["meta"] * (per_video - 1)]


def test_uneven_groups_guidance_and_given_noise(
    ranks: RankPool, generator: torch.Generator
) -> None:
    """Three videos over two groups, with negative prompts, from the noise that rank 0 is given."""
    noise = torch.randn(3, 4, 2, 6, 4, generator=generator)
    changes = {"prompt": ["one", "two", "three"], "negative_prompt": ["a", "b", "c"]}
    changes |= {"true_cfg_scale": 2.0, "output_type": "latent"}
    found = ranks.run(
        2, generate_cases.together, {"dp": 2}, [changes | {"latents": noise}, changes]
    )
    expected = generate_cases.alone(**changes, latents=noise)
    assert difference(found, expected) <= 1e-4
    assert [len(rank["calls"][0]["latents"]) for rank in found] == [4, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A stored pipeline, with and without the weights of its text encoders."""
    place = tmp_path_factory.mktemp("stored")
    tiny_pipeline().save_pretrained(place / "whole")
    shutil.copytree(place / "whole", place / "part")
    for name in ("text_encoder", "text_encoder_2"):
        weights = list((place / "part" / name).glob("*.safetensors"))
        assert weights
        for path in weights:
            path.unlink()
    return {True: str(place / "whole"), False: str(place / "part")}


@pytest.mark.parametrize("layout", [{"cp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_who_does_not_encode_reads_no_weights_of_encoders(
    layout: dict[str, int], ranks: RankPool, folders: dict[bool, str]
) -> None:
    world = math.prod(layout.values())
    weights = [rank % 2 == 0 for rank in range(world)]
    found = ranks.run(
        world, generate_cases.stored, layout, [folders[has] for has in weights], weights
    )
    assert [rank["text on"] for rank in found] == [{"cpu" if has else "meta"} for has in weights]
    assert [rank["encodes"] for rank in found] == [rank["first"] for rank in found] == weights
    assert difference(found, generate_cases.alone(output_type="latent")) <= 1e-4


def test_encoding_without_weights_is_refused_by_all(
    ranks: RankPool, folders: dict[bool, str]
) -> None:
    found = ranks.run(2, generate_cases.stored, {"cp": 2}, [folders[False]] * 2, [False] * 2)
    said = [rank["error"] for rank in found]
    assert said[0].startswith("ValueError: text_weights must be True for the process that encodes")
    assert said[1].startswith("PeerError: rank 0 has failed: ValueError: text_weights must be True")


def test_errors_of_the_call_reach_all(ranks: RankPool) -> None:
    """Nobody waits for a rank that has refused."""
    said = ranks.run(2, generate_cases.refused, {"cp": 2}, {"num_frames": 6})
    assert said[0].startswith("ValueError: num_frames must be")
    assert said[1].startswith("PeerError: rank 0 has failed: ValueError: num_frames must be")
    said = ranks.run(2, generate_cases.refused, {"dp": 2}, {"prompt": "one"})
    assert said[0].startswith("ValueError: num_videos must be at least 2 in all")


def test_layouts_that_do_not_fit(ranks: RankPool) -> None:
    for layout, words in (
        ({"cp": 3}, "dp x cp x tp must be the number of processes, 2"),
        ({"tp": 4}, "tp must divide the 2 heads"),
        ({"dp": 2, "zero": 2}, "zero must be 0 or 3 where nothing is trained, got 2"),
    ):
        assert all(words in said for said in ranks.run(2, generate_cases.not_fitting, layout))


def test_what_one_has_for_all(ranks: RankPool) -> None:
    found = ranks.run(3, generate_cases.exchanged)
    expected = torch.arange(6).to(torch.bfloat16).view(2, 3).T
    for rank in found:
        assert rank["object"] == {"of": 0}
        assert torch.equal(rank["same"], expected) and rank["none"].shape == (0, 2)
    assert found[0]["whole"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert all(rank["whole"].shape == (0, 2) for rank in found[1:])
    assert [rank["bytes"] for rank in found] == [{"broadcast": 12}, {"send": 8}, {"send": 16}]
