"""States on disk: a damaged or half-written one is never loaded, the one before it is."""

import pytest
import torch

from hunyuan_fast.trainer.checkpoint import CheckpointFolder


@pytest.fixture
def folder(tmp_path):
    states = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        states.save(step, {"weight": torch.full((64,), float(step)), "step": step})
    return states


def test_the_newest_two_are_kept(folder):
    assert folder.steps() == [2, 3]
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "state-2.json",
        "state-2.pt",
        "state-3.json",
        "state-3.pt",
    ]
    step, state = folder.load_newest()
    assert step == 3 and state["step"] == 3 and bool((state["weight"] == 3).all())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_state_gives_way_to_the_one_before(folder, damage):
    path = folder.folder / "state-3.pt"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert folder.load_newest()[0] == 2


def test_a_state_without_digest_does_not_exist(folder):
    (folder.folder / "state-3.json").unlink()
    assert folder.load_newest()[0] == 2


def test_all_damaged_is_an_error(folder):
    for step in (2, 3):
        (folder.folder / f"state-{step}.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"every saved state is damaged \(state-3.pt, state-2.pt"):
        folder.load_newest()


def test_no_state_is_none(tmp_path):
    assert CheckpointFolder(tmp_path).load_newest() is None
