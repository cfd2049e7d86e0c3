"""``calibrate-attention``, and ``generate`` with what it wrote, on a model of random weights."""

import json
from pathlib import Path

import pytest
import torch

from hunyuan_fast.data.video import read_metadata, read_video
from hunyuan_fast.models.dit.windows import AttentionWindows

PROMPT = "a red circle moving left"


@pytest.fixture
def calibrated(cli, model: Path):
    """The command, and the file that it wrote."""
    words = ("--model", model, "--height", 64, "--width", 96, "--tile", "1,2,2", "--steps", 2)
    done = cli("calibrate-attention", PROMPT, "a blue star", *words, "-o", "w.json", "--compare")
    assert done.status == 0, done.err
    return done


def test_a_table_and_a_file(calibrated) -> None:
    windows = AttentionWindows.load("w.json")
    assert windows.grid == (2, 4, 6) and windows.tile == (1, 2, 2)
    lines = calibrated.out.splitlines()
    assert lines[0].split() == [
        "window",
        "(tiles",
        "of",
        "1",
        "x",
        "2",
        "x",
        "2)",
        "FLOPs",
        "time",
        "error,",
        "mean",
        "worst",
        "recall",
    ]
    whole = next(line for line in lines if line.startswith("2,2,3"))
    assert whole.split()[1:] == ["100.0%", "100.0%", "0.0000", "0.0000", "100.0%"]
    assert lines[-1].startswith("w.json  ") and "cosine" in lines[-1]


def test_generate_takes_the_windows(cli, model: Path) -> None:
    size = ("--model", model, "--height", 64, "--width", 96, "--steps", 2)
    chosen = ("--windows", "1,1,1", "--tile", "1,2,2", "--budget", 0.4)
    assert cli("calibrate-attention", PROMPT, *size, *chosen, "-o", "w.json").status == 0
    blocks = json.loads(Path("w.json").read_text())["blocks"].values()
    assert all(window == [1, 1, 1] for block in blocks for window in block)
    sparse = cli("generate", PROMPT, *size, "--attention-windows", "w.json", "-o", "sparse.mp4")
    dense = cli("generate", PROMPT, *size, "-o", "dense.mp4")
    assert sparse.status == dense.status == 0, sparse.err
    frames = [read_video(f"{name}.mp4")[0] for name in ("sparse", "dense")]
    assert frames[0].shape == frames[1].shape and not torch.equal(*frames)
    assert read_metadata("sparse.mp4")["attention-windows"] == "w.json"
    assert "--attention-windows w.json" in cli("info", "sparse.mp4").out


def test_windows_that_do_not_fit_are_refused(cli, model: Path, calibrated) -> None:
    words = ("generate", PROMPT, "--attention-windows", "w.json", "-o", "out.mp4")
    size = ("--height", 64, "--width", 96)
    other = cli(*words, "--model", model, "--height", 64, "--width", 64)
    assert other.status == 1
    assert "calibrated for 2 x 4 x 6 tokens (frames, height, width), and this" in other.error
    other = cli(*words, *size)
    assert other.status == 1 and "not for 'nano'; calibrate" in other.error
    assert cli(*words, "--model", f"{model}/", *size).status == 0, "another name of the same folder"
    values = json.loads(Path("w.json").read_text())
    values["blocks"].popitem()
    Path("w.json").write_text(json.dumps(values))
    other = cli(*words, "--model", model, *size, "--overwrite")
    assert other.status == 1 and "blocks of this model" in other.error
    both = cli(*words, *size, "--attention-precision", "fp8")
    assert both.status == 2 and "takes --attention-precision same alone, got fp8" in both.error
    missing = cli("generate", PROMPT, "--attention-windows", "no.json")
    assert missing.status == 1 and "no.json: cannot be read" in missing.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "PROMPT must not be empty"),
        (("",), "PROMPT must not be empty"),
        (("a", "--max-error", 0.1, "--budget", 0.5), "exclude each other"),
        (("a", "--max-error", -1), "--max-error must be at least 0, got -1"),
        (("a", "--budget", 0), "--budget must be above 0 and at most 1, got 0"),
        (("a", "--budget", 0.01), "--budget must be at least 0.0"),
        (("a", "--budget", 0.9, "--windows", "99,99,99"), "--budget must be at least 1.000"),
        (("a", "--windows", ""), "--windows must be three positive numbers"),
        (("a", "--measured", 0), "--measured must be at least 1"),
        (("a", "--tile", "2,2"), "--tile must be three positive numbers such as 1,3,3, got '2,2'"),
        (("a", "--windows", "1,3,3 0,1,1"), "--windows must be three positive numbers"),
        (("a", "--height", 17), "--height must be a multiple of 16"),
        (("a", "-o", "out.mp4"), "-o must end in .json for attention windows"),
    ],
)
def test_bad_words_are_refused(cli, words: tuple[object, ...], message: str) -> None:
    done = cli("calibrate-attention", *words)
    assert done.status == 2 and message in done.error


def test_nothing_is_overwritten_unasked(cli, model: Path) -> None:
    Path("w.json").write_text("mine")
    done = cli("calibrate-attention", PROMPT, "--model", model, "-o", "w.json")
    assert done.status == 1 and "w.json exists; add --overwrite" in done.error
    assert Path("w.json").read_text() == "mine"
