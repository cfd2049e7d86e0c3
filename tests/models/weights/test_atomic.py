"""A saved folder is whole or absent, whatever interrupts the saving."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.weights import CheckpointError, atomic_folder
from hunyuan_fast.models.weights import writer as writer_module
from tests.models.weights.cases import assert_same_weights, random_transformer, random_vae

load = HunyuanVideoTransformer.from_pretrained


def test_saving_again_replaces_our_own_folder(tmp_path: Path, generator: torch.Generator) -> None:
    place = tmp_path / "deep" / "m"
    first, second = random_transformer(generator), random_transformer(generator)
    first.save_pretrained(place, max_shard_bytes=50_000)
    second.save_pretrained(place)
    assert_same_weights(second, load(place))
    assert not list(place.glob("*-of-*")), "shards of the earlier save are left"
    second.save_pretrained(place, layout="diffusers")
    first.save_pretrained(place, layout="diffusers")
    assert_same_weights(first, load(place))
    assert [entry.name for entry in place.parent.iterdir()] == ["m"]


def test_foreign_folders_and_files_are_left_alone(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_transformer(generator)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis: not empty .*chapter\.txt"):
        model.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"

    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: a file has this name"):
        model.save_pretrained(tmp_path / "file")

    random_vae(generator).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="vae: not empty"):
        model.save_pretrained(tmp_path / "vae")

    model.save_pretrained(tmp_path / "annotated")
    (tmp_path / "annotated" / "NOTES.md").write_text("mine")
    with pytest.raises(CheckpointError, match="annotated: not empty"):
        model.save_pretrained(tmp_path / "annotated")
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["annotated", "empty", "file", "thesis", "vae"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_earlier_one(
    tmp_path: Path,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    first = random_transformer(generator)
    first.save_pretrained(tmp_path / "m")
    calls = []
    original = writer_module.save_file

    def interrupted(*args: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error("interrupted")
        original(*args, **options)

    monkeypatch.setattr(writer_module, "save_file", interrupted)
    with pytest.raises(error):
        random_transformer(generator).save_pretrained(tmp_path / "m", max_shard_bytes=50_000)
    with pytest.raises(error):
        calls.clear()
        random_transformer(generator).save_pretrained(tmp_path / "new", max_shard_bytes=50_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert_same_weights(first, load(tmp_path / "m"))


LIMITED = """
import resource, signal, sys, torch
from hunyuan_fast.models import HunyuanVideoTransformer
from tests.models.dit_cases import TINY
model = HunyuanVideoTransformer(**TINY)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    model.save_pretrained(sys.argv[1])
except OSError as error:
    print("OSError", error)
"""

ENDLESS = """
import sys
from hunyuan_fast.models import HunyuanVideoTransformer
from tests.models.dit_cases import TINY
model = HunyuanVideoTransformer(**TINY)
print("ready", flush=True)
while True:
    model.save_pretrained(sys.argv[1], max_shard_bytes=100_000)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_no_room_for_the_file(tmp_path: Path) -> None:
    child = python(LIMITED, str(tmp_path / "m"))
    output, _ = child.communicate(timeout=60)
    assert output.startswith("OSError model.safetensors cannot be written"), output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Under the name there is a whole model or none; never a part of one."""
    draw = random.Random(3)
    survived = 0
    for trial in range(4):
        place = tmp_path / str(trial) / "m"
        child = python(ENDLESS, str(place))
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(0.05 + draw.random() * 0.4)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.returncode == -signal.SIGKILL
        if place.exists():
            load(place)
            survived += 1
        else:
            parts = (
                [entry.name for entry in place.parent.iterdir()] if place.parent.exists() else []
            )
            assert all(name.startswith(".hunyuan-fast-") for name in parts)
    assert survived > 0


def test_atomic_folder_reports_an_unwritable_place(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OSError), atomic_folder(blocker / "below", ours=lambda _: False):
        raise AssertionError("the block ran")
