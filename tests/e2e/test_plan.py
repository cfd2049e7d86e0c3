"""``hunyuan-fast plan``: what it prints, draws and refuses."""

import json
from pathlib import Path

import pytest


def test_the_released_model_on_eight_gpus(cli) -> None:
    done = cli("plan")
    assert done.status == 0 and not done.err
    assert "12.82 B parameters, 119,056 tokens, 12.07 PFLOP" in done.out
    assert "on 8 x H100 SXM 80 GB" in done.out
    assert done.out.count("\n     dp 1, cp 8") == 3
    assert "bound by compute" in done.out
    assert "why not\n" in done.out and "dp 8 is more than the 1 videos" in done.out


def test_the_embedded_model_leaves_gpus_idle(cli) -> None:
    done = cli("plan", "--model", "nano", "--gpus", "4", "--top", "1")
    assert done.status == 0
    assert "nano, 96 x 96 x 17" in done.out
    assert "3 of the 4 GPUs are left idle" in done.out
    assert "bound by kernel starts" in done.out


def test_nothing_fits(cli) -> None:
    done = cli("plan", "--gpu", "4090", "--gpus", "1", "--train")
    assert done.status == 0
    assert "nothing fits: the least is" in done.out


def test_a_curve_is_drawn(cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    done = cli("plan", "--train", "--gpus", "12", "-o", path)
    assert done.status == 0 and str(path) in done.out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert cli("plan", "-o", path).status == 1  # it exists


def test_hardware_of_a_file(cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"like": "h200", "name": "two in a box", "node": 2}))
    done = cli("plan", "--hardware", path, "--gpus", "2")
    assert done.status == 0 and "2 x two in a box" in done.out
    path.write_text("{}")
    done = cli("plan", "--hardware", path)
    assert done.status == 1 and "is missing" in done.err


def test_the_published_table(cli) -> None:
    done = cli("plan", "--check")
    assert done.status == 0
    for seconds in (1904, 934, 514, 338):
        assert f"{seconds} s" in done.out
    assert "predicted: nothing fitted" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus must be from 1 to 4096, got 0"),
        (["--gpus", "4097"], "--gpus must be from 1 to 4096, got 4097"),
        (["--gpu", "v100"], "--gpu must be one of"),
        (["--gpu", "h100", "--hardware", "x.json"], "exclude each other"),
        (["--frames", "128"], "--frames must be 4n + 1, got 128"),
        (["--height", "719"], "--height must be a multiple of 16, got 719"),
        (["--top", "0"], "--top must be at least 1, got 0"),
        (["--text-tokens", "-1"], "--text-tokens must be from 0 to 4096, got -1"),
        (["-o", "plan.txt"], "-o must end in .png"),
    ],
)
def test_what_is_refused(cli, words: list[str], said: str) -> None:
    done = cli("plan", *words)
    assert done.status == 2 and said in done.err
