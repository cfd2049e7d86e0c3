"""The main job: a prompt in, a file out that knows how it was made."""

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from hunyuan_fast.data.video import read_metadata, read_video

PROMPT = "a red circle moving right"


def names_in(folder: str | Path) -> list[str]:
    """What lies in a folder, hidden files included."""
    return sorted(entry.name for entry in Path(folder).iterdir())


def test_as_a_user_does(run_program, model: Path, tmp_path: Path) -> None:
    done = run_program("generate", PROMPT, "-o", "out.mp4", "--model", model)
    assert done.status == 0, done.err
    assert names_in(tmp_path) == ["out.mp4"]
    frames, fps = read_video(tmp_path / "out.mp4")
    assert frames.shape == (5, 32, 32, 3) and fps == 8
    for stage in ("load", "encode", "denoise", "decode", "write", "total"):
        assert any(
            line.startswith(stage) and " s " in line and line.endswith("iB")
            for line in done.out.splitlines()
        ), done.out
    assert "out.mp4  32x32, 5 frames, 8 fps" in done.out


def test_the_embedded_model(run_program, tmp_path: Path) -> None:
    done = run_program("generate", PROMPT, "-o", "out.mp4")
    assert done.status == 0, done.err
    frames, _ = read_video(tmp_path / "out.mp4")
    assert min(frames.shape[1:3]) >= 96 and len(frames) >= 17


def test_the_file_repeats_itself(cli, model: Path, tmp_path: Path) -> None:
    """Every parameter is in the file; the printed command makes the same pixels."""
    prompt = "a 'red' $circle \"on\" the\nleft 红 -- %s"
    given = ["--model", model, "--seed", 7, "--steps", 2, "--frames", 9, "--width", 48]
    given += ["--shift", 3.5, "--true-cfg", 2, "--negative", "blue", "--fps", 12.5]
    given += ["--attention-precision", "fp8"]
    first = cli("generate", prompt, "-o", "a.mp4", *given)
    assert first.status == 0, first.err
    metadata = read_metadata("a.mp4")
    expected = {
        "prompt": prompt,
        "model": str(model),
        "seed": 7,
        "steps": 2,
        "frames": 9,
        "width": 48,
        "height": 32,
        "shift": 3.5,
        "true-cfg": 2,
        "negative": "blue",
        "fps": 12.5,
        "guidance": 6.0,
        "dtype": "float32",
        "attention-precision": "fp8",
    }
    assert {name: metadata[name] for name in expected} == expected

    told = cli("info", "a.mp4")
    assert told.status == 0
    printed = told.out.strip().splitlines()[-1]
    words = subprocess.run(
        ["bash", "-c", f'set -- {printed}; printf "%s\\0" "$@"'], capture_output=True, check=True
    ).stdout.decode()
    program, *words = words.split("\0")[:-1]
    assert program == "hunyuan-fast" and words[-1] == prompt
    again = cli(*words[:-2], "-o", "b.mp4", *words[-2:])
    assert again.status == 0, again.err
    assert torch.equal(read_video("a.mp4")[0], read_video("b.mp4")[0])
    assert read_metadata("b.mp4") == metadata


def test_the_parameters_matter(cli, model: Path) -> None:
    """Each of them changes the pixels, so none is lost on the way."""
    base = ("generate", PROMPT, "--model", model, "--steps", 2)
    changes = {
        "plain": (),
        "seed": ("--seed", 1),
        "shift": ("--shift", 3),
        "guidance": ("--guidance", 1),
        "true-cfg": ("--true-cfg", 4),
        "negative": ("--true-cfg", 4, "--negative", "blue star"),
        "steps": ("--steps", 3),
        "attention-precision": ("--attention-precision", "fp8"),
    }
    clips = {}
    for name, words in changes.items():
        done = cli(*base, *words, "-o", f"{name}.mp4")
        assert done.status == 0, done.err
        clips[name] = read_video(f"{name}.mp4")[0]
    names = list(clips)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert not torch.equal(clips[name], clips[other]), f"{name} is {other}"


def test_one_frame_is_an_image(cli, model: Path) -> None:
    from PIL import Image

    done = cli("generate", PROMPT, "--model", model, "--frames", 1, "-o", "out.png")
    assert done.status == 0, done.err
    with Image.open("out.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
    assert read_metadata("out.png")["frames"] == 1
    assert "--frames 1 " in cli("info", "out.png").out


def test_several_videos(cli, model: Path, tmp_path: Path) -> None:
    """Video i is the one that seed + i makes alone, and its file says so."""
    done = cli("generate", PROMPT, "--model", model, "--num-videos", 3, "--seed", 5, "-o", "o.mp4")
    assert done.status == 0, done.err
    assert names_in(tmp_path) == ["o_0.mp4", "o_1.mp4", "o_2.mp4"]
    assert [read_metadata(f"o_{i}.mp4")["seed"] for i in range(3)] == [5, 6, 7]
    alone = cli("generate", PROMPT, "--model", model, "--seed", 6, "-o", "alone.mp4")
    assert alone.status == 0
    difference = read_video("alone.mp4")[0].int() - read_video("o_1.mp4")[0].int()
    assert difference.abs().max() <= 3  # batched kernels round otherwise


def test_default_names_ignore_the_prompt(cli, model: Path, tmp_path: Path) -> None:
    for prompt in ("../" * 30 + "etc", "红" * 500, "a\tred\x1b[31m circle"):
        done = cli("generate", prompt, "--model", model, "--steps", 1)
        assert done.status == 0, done.err
    names = [f"hunyuan-000{i}.mp4" for i in (1, 2, 3)]
    assert names_in(tmp_path) == names
    told = cli("info", names[2]).out
    assert "\x1b" not in told and "\\x1b" in told


def test_missing_directories_are_made(cli, model: Path) -> None:
    done = cli("generate", PROMPT, "--model", model, "-o", "new/deep/out.mp4")
    assert done.status == 0, done.err
    assert names_in("new/deep") == ["out.mp4"]


def test_overwrite_is_explicit(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("precious")
    refused = cli("generate", PROMPT, "--model", model, "-o", "out.mp4")
    assert refused.status == 1
    assert "out.mp4 exists; add --overwrite" in refused.error
    assert (tmp_path / "out.mp4").read_text() == "precious"
    allowed = cli("generate", PROMPT, "--model", model, "-o", "out.mp4", "--overwrite")
    assert allowed.status == 0, allowed.err
    assert read_video("out.mp4")[0].shape[0] == 5


def test_a_long_prompt_warns_in_one_line(cli, model: Path) -> None:
    done = cli("generate", "red star " * 40, "--model", model, "--steps", 1, "-o", "out.mp4")
    assert done.status == 0
    warned = [line for line in done.err.splitlines() if "warning" in line]
    assert warned and all(line.startswith("hunyuan-fast: warning: prompt too") for line in warned)


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_leaves_nothing(
    command: list[str],
    environment: dict[str, str],
    model: Path,
    tmp_path: Path,
    sent: signal.Signals,
    status: int,
    said: str,
) -> None:
    """Ctrl-C, or a kind kill, in the middle of sampling."""
    words = ["generate", PROMPT, "--model", str(model), "--steps", "1000", "-o", "new/out.mp4"]
    process = subprocess.Popen(
        [*command, *words],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # where the tests themselves run in the background of a shell, children would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("denoise"):
            break
    time.sleep(0.3)
    process.send_signal(sent)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == status
    assert rest == f"hunyuan-fast: {said}; no unfinished file is left\n"
    assert not names_in(tmp_path)


def test_full_disk_leaves_nothing(run_program, model: Path, tmp_path: Path) -> None:
    """A file size limit stands for the disk that fills up while the video is written."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    done = run_program("generate", PROMPT, "--model", model, "-o", "out.mp4", preexec_fn=limit)
    assert done.status == 1
    assert done.error.startswith("error: File too large: out.mp4; free some space")
    assert not names_in(tmp_path)


def test_info_of_a_stranger(cli, tmp_path: Path) -> None:
    from hunyuan_fast.data.video import write_video
    from tests.data.test_video import smooth_clip

    write_video("plain.mp4", smooth_clip(), 24)
    assert "hunyuan-fast did not write it" in cli("info", "plain.mp4").error
    hostile = {"program": "hunyuan-fast", "command": "generate", "seed": "1; rm -rf ~", "x\x07": 1}
    write_video("hostile.mp4", smooth_clip(), 24, hostile)
    told = cli("info", "hostile.mp4")
    assert told.status == 0 and "\x07" not in told.out
    assert shlex.split(told.out.splitlines()[-1])[2:4] == ["--seed", "1; rm -rf ~"]
    assert json.dumps(hostile)  # plain JSON, nothing clever
