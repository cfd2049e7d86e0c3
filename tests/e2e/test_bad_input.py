"""Every wrong call gets one clear line, the right status, and leaves no file behind."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hunyuan_fast.data.video import write_video
from tests.data.test_video import smooth_clip

PROMPT = "a red circle"

# name: (words after the prompt and the model, what the line must say)
USAGE = {
    "frames 0": (["--frames", 0], ["--frames must be", "4n + 1", "got 0"]),
    "frames -3": (["--frames", -3], ["--frames must be", "4n + 1", "got -3"]),
    "frames 8": (["--frames", 8], ["--frames must be", "4n + 1", "got 8", "5 or 9"]),
    "frames 10": (["--frames", 10], ["--frames must be", "4n + 1", "got 10", "9 or 13"]),
    "frames 11": (["--frames", 11], ["--frames must be", "4n + 1", "got 11"]),
    "frames 12": (["--frames", 12], ["--frames must be", "4n + 1", "got 12"]),
    "frames huge": (["--frames", 10**9 + 1], ["--frames must be", "4097"]),
    "frames 9.0": (["--frames", "9.0"], ["--frames", "a whole number", "'9.0'"]),
    "frames word": (["--frames", "nine"], ["--frames", "a whole number", "'nine'"]),
    "frames left out": (["--frames"], ["--frames", "value"]),
    "height 0": (["--height", 0], ["--height must be a multiple of 16", "got 0"]),
    "height negative": (["--height", -16], ["--height must be a multiple of 16", "got -16"]),
    "height 100": (
        ["--height", 100],
        ["--height must be a multiple of 16", "got 100", "96 or 112"],
    ),
    "height 8": (["--height", 8], ["--height must be a multiple of 16", "got 8"]),
    "height huge": (["--height", 1 << 20], ["--height must be", "16384"]),
    "height word": (["--height", "720p"], ["--height", "a whole number", "'720p'"]),
    "width 33": (["--width", 33], ["--width must be a multiple of 16", "got 33"]),
    "width empty": (["--width", ""], ["--width", "a whole number", "''"]),
    "too many tokens": (
        ["--height", 16384, "--width", 16384, "--frames", 4097],
        ["--height, --width and --frames must give at most", "video tokens"],
    ),
    "steps 0": (["--steps", 0], ["--steps must be from 1 to 1000", "got 0"]),
    "steps -1": (["--steps", -1], ["--steps must be from 1 to 1000", "got -1"]),
    "steps huge": (["--steps", 10**6], ["--steps must be from 1 to 1000"]),
    "steps fraction": (["--steps", "2.5"], ["--steps", "a whole number", "'2.5'"]),
    "guidance NaN": (["--guidance", "nan"], ["--guidance", "finite", "'nan'"]),
    "guidance inf": (["--guidance", "inf"], ["--guidance", "finite", "'inf'"]),
    "guidance -1": (["--guidance", -1], ["--guidance must be", "got -1"]),
    "guidance huge": (["--guidance", 70], ["--guidance must be", "60", "got 70"]),
    "guidance word": (["--guidance", "strong"], ["--guidance", "number", "'strong'"]),
    "true-cfg 0.5": (["--true-cfg", 0.5], ["--true-cfg must be", "got 0.5"]),
    "true-cfg NaN": (["--true-cfg", "nan"], ["--true-cfg", "finite", "'nan'"]),
    "shift 0": (["--shift", 0], ["--shift must be", "got 0"]),
    "shift -7": (["--shift", -7], ["--shift must be", "got -7"]),
    "shift inf": (["--shift", "inf"], ["--shift", "finite", "'inf'"]),
    "seed -1": (["--seed", -1], ["--seed must be", "got -1"]),
    "seed huge": (["--seed", 2**63], ["--seed must be", "got 9223372036854775808"]),
    "seed word": (["--seed", "random"], ["--seed", "a whole number", "'random'"]),
    "seed runs over": (["--seed", 2**63 - 1, "--num-videos", 2], ["--seed must be"]),
    "num-videos 0": (["--num-videos", 0], ["--num-videos must be", "got 0"]),
    "num-videos huge": (["--num-videos", 10**6], ["--num-videos must be", "got 1000000"]),
    "negative without effect": (["--negative", "blue"], ["--negative must be", "--true-cfg"]),
    "fps 0": (["--fps", 0], ["--fps must be above 0", "got 0"]),
    "fps -24": (["--fps", -24], ["--fps must be above 0", "got -24"]),
    "fps huge": (["--fps", 10**6], ["--fps must be", "at most 1000"]),
    "fps NaN": (["--fps", "nan"], ["--fps", "finite", "'nan'"]),
    "dtype int8": (["--dtype", "int8"], ["--dtype must be one of float32", "'int8'"]),
    "dtype float64": (["--dtype", "float64"], ["--dtype must be one of", "'float64'"]),
    "dtype empty": (["--dtype", ""], ["--dtype must be one of", "''"]),
    "precision int8": (
        ["--attention-precision", "int8"],
        ["--attention-precision must be one of 'same', 'fp8'", "'int8'"],
    ),
    "device tpu": (["--device", "tpu"], ["--device must be", "'tpu'"]),
    "device meta": (["--device", "meta"], ["--device must be", "'meta'"]),
    "device 99": (["--device", "cuda:99"], ["--device must be", "'cuda:99'"]),
    "device empty": (["--device", ""], ["--device must be", "''"]),
    "suffix avi": (["-o", "out.avi"], ["-o must end in .mp4", "'out.avi'"]),
    "no suffix": (["-o", "out"], ["-o must end in .mp4", "'out'"]),
    "image name for a video": (["-o", "out.png"], ["-o must end in .mp4", "'out.png'"]),
    "video name for a frame": (["--frames", 1, "-o", "out.mp4"], ["-o must end in .png"]),
    "directory": (["-o", "."], ["-o must be a file name", "directory"]),
    "empty name": (["-o", ""], ["-o must be a file name"]),
    "unknown option": (["--colour", "red"], ["Unrecognized options: --colour"]),
    "misspelt option": (["--step", 3], ["--step", "perhaps you meant --steps"]),
    "unquoted prompt": (["circle"], ["circle"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(cli: Callable, model: Path, tmp_path: Path, case: str) -> None:
    words, said = USAGE[case]
    done = cli("generate", PROMPT, "--model", model, *words)
    assert done.status == 2, done
    assert all(part in done.error for part in said), done.error
    assert not done.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate"], "Missing from hunyuan-fast generate: PROMPT"),
        (["generate", ""], "PROMPT must not be empty"),
        (["generate", " \n\t"], "PROMPT must not be empty"),
        (["generte", "x"], "no command 'generte'; expected one of"),
        (["--model", "nano"], "no command '--model'"),
        (["train", "mega"], "no recipe 'mega'; expected one of nano"),
        (["info"], "Missing from hunyuan-fast info"),
        (["doctor", "--fix"], "Unrecognized options: --fix"),
        (["reconstruct"], "Missing from hunyuan-fast reconstruct: CLIP"),
        (["reconstruct", "a.mp4", "--tiling", "all"], "'official', 'diffusers', 'none'"),
        (["reconstruct", "a.mp4", "--frames", "6"], "--frames must be 4n + 1, got 6; use 5 or 9"),
        (["reconstruct", "a.mp4", "--frames", "0"], "--frames must be 4n + 1, got 0; use 1 or 5"),
        (["reconstruct", "a.mp4", "--height", "20"], "--height must be a positive multiple of 8"),
        (["reconstruct", "a.mp4", "--width", "-8"], "--width must be a positive multiple of 8"),
        (["reconstruct", "a.mp4", "-o", "b.gif"], "-o must end in .mp4"),
        (["reconstruct", "a.mp4", "--memory-budget", "lots"], "--memory-budget must be a number"),
        (["reconstruct", "a.mp4", "--memory-budget", "0GiB"], "--memory-budget must be positive"),
        (
            ["reconstruct", "a.mp4", "--memory-budget", "1GiB", "--tiling", "official"],
            "--tiling must be none with --memory-budget",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_of_any_command(cli: Callable, tmp_path: Path, words: list[str], said: str) -> None:
    done = cli(*words)
    assert done.status == 2, done
    assert said in done.error
    assert not done.out and not list(tmp_path.iterdir())


def test_wrong_values_are_refused_quickly(cli: Callable, model: Path) -> None:
    """No weight is read for them."""
    cli("generate", PROMPT, "--model", model, "--frames", 8)  # imports
    began = time.process_time()
    assert cli("generate", PROMPT, "--model", model, "--frames", 8).status == 2
    assert time.process_time() - began < 1


# name: (what to do to a copy of the model's folder, what the line must say)
MODELS = {
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), ["vae"]),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer"]),
    "no settings": (lambda folder: (folder / "hunyuan_fast.json").unlink(), ["hunyuan_fast.json"]),
    "broken settings": (
        lambda folder: (folder / "hunyuan_fast.json").write_text("{"),
        ["hunyuan_fast.json"],
    ),
    "truncated weights": (
        lambda folder: _truncate(next((folder / "transformer").glob("*.safetensors"))),
        ["transformer", ".safetensors"],
    ),
    "mixed-up folders": (
        lambda folder: (
            (folder / "vae").rename(folder / "x")
            and shutil.copytree(folder / "transformer", folder / "vae")
        ),
        ["vae"],
    ),
    "empty": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], ["empty"]),
    "NaN weights": (lambda folder: _poison(folder), ["nan", "step 1"]),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _poison(folder: Path) -> None:
    from hunyuan_fast.models import HunyuanVideoTransformer

    transformer = HunyuanVideoTransformer.from_pretrained(folder / "transformer")
    with torch.no_grad():
        next(transformer.parameters()).fill_(torch.nan)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")


@pytest.mark.parametrize("case", MODELS)
def test_damaged_models(
    cli: Callable, model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    spoil, said = MODELS[case]
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(model, folder)
    spoil(folder)
    done = cli("generate", PROMPT, "--model", folder, "-o", "new/out.mp4")
    assert done.status == 1, done
    assert all(part in done.error for part in said), done.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nanoo", "no/such/folder", "nobody/no-such-model", "/"])
def test_unknown_models(cli: Callable, tmp_path: Path, name: str) -> None:
    done = cli("generate", PROMPT, "--model", name)
    assert done.status == 1
    assert name in done.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("x" * 300 + ".mp4", "File name too long"),
        ("/proc/out.mp4", "cannot be written"),
        ("taken/out.mp4", "cannot be written"),
        ("/dev/null/out.mp4", "cannot be written"),
        ("pipe.mp4", "no regular file"),
        ("dangling.mp4", "exists; add --overwrite"),
    ],
    ids=lambda value: value[:20],
)
def test_the_place_is_tried_first(
    cli: Callable, model: Path, tmp_path: Path, out: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hunyuan_fast import HunyuanVideoPipeline

    def too_late(*_: object, **__: object) -> None:
        pytest.fail("loaded the model although the result has no place")

    monkeypatch.setattr(HunyuanVideoPipeline, "from_pretrained", too_late)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    before = sorted(tmp_path.iterdir())
    done = cli("generate", PROMPT, "--model", model, "-o", out)
    assert done.status == 1
    assert said in done.error and "with -o" in done.error
    assert sorted(tmp_path.iterdir()) == before


def test_no_room(cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    done = cli("generate", PROMPT, "--model", model)
    assert done.status == 1
    assert "has 0 MiB free" in done.error


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "out of memory"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("bug"), "bug"),
        (KeyError("x"), "internal error, KeyError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failures_at_the_very_end(
    cli: Callable,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    said: str,
) -> None:
    """The file is complete but for the last call: the temporary one goes, an old one stays."""

    def fail(_: int) -> None:
        raise failure

    (tmp_path / "out.mp4").write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    done = cli("generate", PROMPT, "--model", model, "-o", "out.mp4", "--overwrite")
    assert done.status == (130 if isinstance(failure, KeyboardInterrupt) else 1)
    assert said in done.error
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "old"


def test_debug_shows_the_traceback(cli: Callable, model: Path) -> None:
    done = cli("generate", PROMPT, "--model", model, "--frames", 8, "--debug")
    assert done.status == 2
    assert "Traceback" in done.err and "read_request" in done.err
    assert done.err.splitlines()[-1].startswith("hunyuan-fast: error: --frames must be")


@pytest.fixture
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that cannot be used, each in its own way."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    write_video(folder / "small.mp4", smooth_clip(3, 6, 64), 24)
    write_video(folder / "short.mp4", smooth_clip(3), 24)
    data = (folder / "short.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile short.mp4\n")
    return folder


@pytest.mark.parametrize(
    ("clip", "words", "said"),
    [
        ("missing.mp4", (), "missing.mp4 is not a file"),
        ("folder.mp4", (), "folder.mp4 is not a file"),
        ("text.mp4", (), "text.mp4 is not a readable video"),
        ("empty.mp4", (), "empty.mp4 is not a readable video"),
        ("cut.mp4", (), "cut.mp4 is not a readable video"),
        ("list.mp4", (), "list.mp4 is not a readable video"),
        ("small.mp4", (), "at least 8x8"),
        ("short.mp4", ("--frames", 5), "--frames must be at most 1"),
        ("short.mp4", ("--model", "nanoo"), "nanoo"),
    ],
)
def test_clips(
    cli: Callable, model: Path, clips: Path, tmp_path: Path, clip: str, words: tuple, said: str
) -> None:
    done = cli("reconstruct", clips / clip, "--model", model, *words)
    assert done.status == (2 if words[:1] == ("--frames",) else 1), done
    assert said in done.error
    assert not list(tmp_path.iterdir())


def test_a_budget_that_cannot_work(cli: Callable, model: Path, clips: Path, tmp_path: Path) -> None:
    """The least one is named, and works."""
    words = ("reconstruct", clips / "short.mp4", "--model", model, "--memory-budget")
    done = cli(*words, "5MB")
    assert done.status == 1
    assert "--memory-budget must be at least " in done.error and "got 5MiB" in done.error
    assert not list(tmp_path.iterdir())
    least = done.error.split("at least ")[1].split()[0]
    done = cli(*words, least)
    assert done.status == 0, done.err


@pytest.mark.parametrize("name", ["text.mp4", "empty.mp4", "folder.mp4", "missing.mp4"])
def test_info(cli: Callable, clips: Path, name: str) -> None:
    done = cli("info", clips / name)
    assert done.status == 1
    assert name in done.error


def test_reconstruct_refuses_nan(
    cli: Callable, model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hunyuan_fast.models import HunyuanVideoVAE

    monkeypatch.setattr(
        HunyuanVideoVAE, "decode", lambda self, z: torch.full((1, 3, 1, 48, 64), torch.nan)
    )
    done = cli("reconstruct", clips / "short.mp4", "--model", model)
    assert done.status == 1
    assert "the VAE returned NaN" in done.error
    assert not list(tmp_path.iterdir())
