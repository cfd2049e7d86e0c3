"""Every stage of nano by several processes."""

from pathlib import Path

from tests.distributed import nano_stages_cases as cases
from tests.kit.ranks import RankPool


def test_gradients_are_those_of_one_process(ranks: RankPool) -> None:
    for found in ranks.run(2, cases.compare, ("vae", "llm", "clip"), 2):
        for kind, (loss, gradient) in found.items():
            assert loss <= 1e-6 and gradient <= 1e-5, (kind, loss, gradient)


def test_more_processes_than_samples(ranks: RankPool) -> None:
    for found in ranks.run(4, cases.compare, ("vae",), 4):
        assert max(found["vae"]) <= 1e-5


def test_latents_are_those_of_one_process(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, cases.encoded, str(tmp_path), 3) == [True] * 3
