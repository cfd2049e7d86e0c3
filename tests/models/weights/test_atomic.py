"""A saved folder is whole or absent, whatever interrupts the saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.weights import CheckpointError, atomic_folder
from hunyuan_fast.models.weights.streamed import TensorsFile
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
    original = TensorsFile.write

    def interrupted(file: TensorsFile, name: str, tensor: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise error("interrupted")
        original(file, name, tensor)

    monkeypatch.setattr(TensorsFile, "write", interrupted)
    with pytest.raises(error):
        random_transformer(generator).save_pretrained(tmp_path / "m", max_shard_bytes=50_000)
    with pytest.raises(error):
        calls.clear()
        random_transformer(generator).save_pretrained(tmp_path / "new", max_shard_bytes=50_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert_same_weights(first, load(tmp_path / "m"))


LIMITED = """
import os, resource, signal, sys, torch
os.fsync = lambda descriptor: None
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

# One warm process; its fork number n kills itself at the n-th call that touches the file system.
KILLED = """
import json, os, shutil, signal, sys
os.fsync = lambda descriptor: None  # a kill loses nothing that the kernel has; a power cut does
from pathlib import Path
import torch
from hunyuan_fast.models import HunyuanVideoTransformer
from tests.models.dit_cases import TINY

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
old, new = HunyuanVideoTransformer(**TINY), HunyuanVideoTransformer(**TINY)
root, replacing = Path(sys.argv[1]), sys.argv[2] == "replacing"
counts = {"killed": 0, "absent": 0, "old": 0, "new": 0}

def save_and_die_at(number, place):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event not in EVENTS:
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    new.save_pretrained(place, max_shard_bytes=400_000)

number, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    number += 1
    place = root / str(number) / "m"
    if replacing:
        old.save_pretrained(place)
    child = os.fork()
    if child == 0:
        save_and_die_at(number, place)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    counts["killed"] += status == signal.SIGKILL
    if not place.exists():
        counts["absent"] += 1
        # Between two renames the earlier model and the new one both lie beside the name.
        whole = list(place.parent.glob(".hunyuan-fast-*/manifest.json")) if replacing else []
        assert not replacing or len(whole) == 2, number
        continue
    found = HunyuanVideoTransformer.from_pretrained(place)
    is_new = torch.equal(found.img_in.proj.weight, new.img_in.proj.weight)
    assert is_new or torch.equal(found.img_in.proj.weight, old.img_in.proj.weight), number
    counts["new" if is_new else "old"] += 1
assert status == 0, status
print(json.dumps(counts))
"""


def test_every_file_is_durable_before_the_name_appears(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = Path.rename

    def synced(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def renamed(source: Path, target: Path) -> Path:
        events.append("rename")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    random_transformer(generator).save_pretrained(tmp_path / "m", max_shard_bytes=100_000)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {entry.name for entry in (tmp_path / "m").iterdir()} < set(before)
    assert any(name.startswith(".hunyuan-fast-") for name in before)
    assert after == [tmp_path.name]


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


def test_no_room_for_the_file(tmp_path: Path) -> None:
    child = python(LIMITED, str(tmp_path / "m"))
    output, _ = child.communicate(timeout=60)
    assert output.startswith("OSError model.safetensors cannot be written"), output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("case", ["fresh", "replacing"])
def test_killed_at_every_step(tmp_path: Path, case: str) -> None:
    """Under the name there is a whole model or none; never a part of one."""
    output, _ = python(KILLED, str(tmp_path), case).communicate()
    counts = json.loads(output)
    assert counts["killed"] > 15
    assert counts["new"] > 1
    if case == "fresh":
        assert counts["absent"] > 10 and counts["old"] == 0
    else:
        assert counts["old"] > 10 and counts["absent"] <= 2


def test_atomic_folder_reports_an_unwritable_place(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OSError), atomic_folder(blocker / "below", ours=lambda _: False):
        raise AssertionError("the block ran")
