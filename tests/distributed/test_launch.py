"""``torchrun -m hunyuan_fast generate``: the video of one process, or one word on why not."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hunyuan_fast.cli import main
from hunyuan_fast.cli.parallel import ParallelOptions, named, read_layout
from hunyuan_fast.data.video import read_metadata
from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.distributed.verdict import DEATH
from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.pipelines import HunyuanVideoPipeline
from tests.kit import faulty_command

ROOT = Path(__file__).parents[2]
FP8 = ("generate", "x", "--attention-precision", "fp8")
WINDOWS = ("generate", "x", "--attention-windows", "w.json")
SIZE = ("--height", "32", "--width", "48", "--frames", "5", "--steps", "2")
NANO_SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}


@dataclass(frozen=True)
class Run:
    """What torchrun left behind."""

    status: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """Lines of ours, without those of torchrun."""
        return [line for line in self.err.splitlines() if line.startswith("hunyuan-fast: ")]


def torchrun(folder: Path, *words: str, timeout: float = 120, **environment: str) -> Run:
    """Two processes; fails if any is left when torchrun has ended."""
    given = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*given, faulty_command.__file__, *words],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
        assert not alive(process.pid)
    finally:
        for left in alive(process.pid):
            os.kill(left, signal.SIGKILL)
    return Run(process.returncode, out, err)


def alive(session: int) -> list[int]:
    """Processes of a session."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found


def test_the_video_of_one_process(tmp_path: Path) -> None:
    words = ("generate", "a red circle", *SIZE, "--cp", "2", "-o", "out.mp4")
    done = torchrun(tmp_path, *words, LATENTS=str(tmp_path / "latents"))
    assert done.status == 0, done.err
    assert done.out.count("out.mp4  48x32, 5 frames") == 1
    assert done.err.count("denoise ...") == 1 and "warning" not in done.err
    assert read_metadata(tmp_path / "out.mp4")["layout"] == "--cp 2"
    nano = HunyuanVideoPipeline.from_pretrained("nano")
    alone = nano("a red circle", **NANO_SIZE, output_type="latent")
    latents = torch.load(tmp_path / "latents")
    assert float((latents - alone).abs().max()) <= 1e-4


def test_windows_and_exchanged_heads(tmp_path: Path) -> None:
    """The latents of one process with the same windows."""
    nano = HunyuanVideoPipeline.from_pretrained("nano")
    heads = nano.transformer.config.heads_num
    some = tuple((1 + head % 2, 1, 1 + head) for head in range(heads))
    blocks = dict.fromkeys(nano.transformer.attention_blocks(), some)
    windows = AttentionWindows(model="nano", grid=(2, 2, 3), tile=(1, 1, 1), blocks=blocks)
    windows.save(tmp_path / "w.json")
    words = ("generate", "a red circle", *SIZE, "--attention-windows", "w.json", "-o", "out.mp4")
    layout = ("--cp", "2", "--ulysses", "2")
    done = torchrun(tmp_path, *words, *layout, LATENTS=str(tmp_path / "latents"))
    assert done.status == 0, done.err
    metadata = read_metadata(tmp_path / "out.mp4")
    assert metadata["layout"] == "--cp 2 --ulysses 2"
    assert metadata["attention-windows"] == "w.json"
    nano.transformer.set_attention(windows=windows)
    alone = nano("a red circle", **NANO_SIZE, output_type="latent")
    assert float((torch.load(tmp_path / "latents") - alone).abs().max()) <= 1e-4


@pytest.mark.parametrize(("fault", "said"), [("1 raise", "error: planted"), ("1 kill", DEATH)])
def test_a_failure_ends_all(fault: str, said: str, tmp_path: Path) -> None:
    words = ("generate", "a red circle", *SIZE, "--cp", "2", "-o", "new/out.mp4")
    failed = torchrun(tmp_path, *words, FAULT=fault)
    assert time.time() - (tmp_path / "fault").stat().st_mtime < 30
    assert failed.status == 1
    assert len(failed.told) == 1, failed.err
    assert failed.told[0].startswith(f"hunyuan-fast: rank {fault[0]} of 2 (")
    assert failed.told[0].endswith(f"): {said}")
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_wrong_command_line_is_told_once(tmp_path: Path) -> None:
    failed = torchrun(tmp_path, "generate", "a red circle", "--cp", "3")
    assert failed.status == 1 and "exitcode  : 2" in failed.err
    assert len(failed.told) == 1, failed.err
    assert "--cp x --tp must be the number of processes, 2, got 1 x 3 x 1 = 3" in failed.told[0]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = torchrun(tmp_path, "generate", "a red circle", "--cp", "2", "-o", "file/out.mp4")
    assert failed.status == 1
    assert len(failed.told) == 1, failed.err
    assert failed.told[0].startswith("hunyuan-fast: rank 0 of 2 (")
    assert "file/out.mp4 cannot be written" in failed.told[0]


def test_without_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the command to type."""
    words = ["generate", "a 'red' circle", "--cp", "2", "--tp", "2", "--no-sequence-parallel"]
    monkeypatch.setattr(sys, "argv", ["hunyuan-fast", *words])
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "is the work of 4 processes, and this is one; start them with: torchrun" in said
    assert "--nproc-per-node 4 -m hunyuan_fast generate 'a '\"'\"'red'\"'\"' circle' --cp 2" in said
    for wrong, message in (
        (("--cp", "0"), "--cp must be at least 1, got 0"),
        (("--cp", "4", "--ulysses", "3"), "--ulysses must divide cp = 4, got 3"),
        (("--offload",), "--offload must go with zero = 3, got zero = 0"),
    ):
        assert main(["generate", "x", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_layout_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(Layout()) == ""
    layout = Layout(dp=2, cp=4, ulysses=2, tp=2, sequence_parallel=False, zero=3, offload=True)
    words = "--dp 2 --cp 4 --ulysses 2 --tp 2 --no-sequence-parallel --zero 3 --offload"
    assert named(layout) == words
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "box")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_layout(ParallelOptions(cp=2), "generate") == Layout(cp=2)


def test_too_few_videos_and_commands_of_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "box")
    for words, message in (
        (("generate", "x", "--dp", "2"), "--dp 2 deals out videos, and there is 1; make at least"),
        (("generate", "x", "--tp", "2", "--device", "cuda:1"), "--device must be cpu or cuda"),
        ((*FP8, "--cp", "2"), "--attention-precision fp8 takes --ulysses 2, as many processes as"),
        ((*WINDOWS, "--cp", "2"), "--attention-windows takes --ulysses 2, as many processes as"),
        (("doctor",), "doctor is the work of one process; start it without torchrun"),
    ):
        assert main(list(words)) == 2
        assert message in capsys.readouterr().err
