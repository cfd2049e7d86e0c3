"""The table of GPUs, files that describe others, and links."""

import json
import sys
from pathlib import Path

import pytest

from hunyuan_fast.planning.hardware import GPUS, find_gpu, hardware_text, read_hardware
from hunyuan_fast.planning.layouts import Group
from hunyuan_fast.planning.links import exchange_seconds, gather_seconds, hop_seconds


def test_the_table() -> None:
    assert set(GPUS) == {"a100-40", "a100-80", "h100", "h200", "h20", "b200", "l40s", "4090"}
    assert find_gpu("H200").memory_gib > find_gpu("h100").memory_gib
    assert find_gpu("h200").gemm_rate == pytest.approx(790e12, rel=0.01)
    with pytest.raises(ValueError, match=r"gpu must be one of 4090, a100-40, .*, got 'v100'"):
        find_gpu("v100")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(hardware_text(GPUS["b200"]))
    assert read_hardware(path) == GPUS["b200"]


def test_a_file_changes_a_gpu_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"like": "h100", "name": "half a node", "node": 4}))
    mine = read_hardware(path)
    assert (mine.node, mine.tflops, mine.name) == (4, GPUS["h100"].tflops, "half a node")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"like": "h100", "speed": 3}, "speed is not known; expected like, name, tflops"),
        ({"like": "v100"}, "gpu must be one of"),
        ({"name": "x"}, "tflops is missing; give it, or a GPU to start from as like"),
        ({"like": "h100", "tflops": "fast"}, "tflops must be a number, got 'fast'"),
        ({"like": "h100", "tflops": 0}, "tflops must be positive, got 0"),
        ({"like": "h100", "gemm": 1.5}, "gemm must be at most 1, got 1.5"),
        ({"like": "h100", "node": 2.5}, "node must be a whole number, got 2.5"),
        ({"like": "h100", "name": ""}, "name must be a text, got ''"),
        ([1], "must hold names and values, got list"),
    ],
)
def test_files_that_are_refused(data: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises((ValueError, TypeError), match=r"mine\.json") as caught:
        read_hardware(path)
    assert said in str(caught.value)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json cannot be read"):
        read_hardware(path)


def test_links_within_a_node_and_across() -> None:
    hardware, size = GPUS["h100"], 1e9
    for seconds in (hop_seconds, exchange_seconds, gather_seconds):
        assert seconds(size, Group(1, 1), hardware) == 0
        near = seconds(size, Group(4, 1), hardware)
        far = seconds(size, Group(4, 8), hardware)
        assert 0 < near < far / 3
    # a whole node gathers through all its ways out at once
    spread = gather_seconds(size, Group(16, 1), hardware)
    assert spread < gather_seconds(size, Group(2, 8), hardware) / 3


def test_who_shares_a_node() -> None:
    assert Group(8, 1).within(8) == 8
    assert Group(8, 4).within(8) == 2
    assert Group(8, 16).within(8) == 1
