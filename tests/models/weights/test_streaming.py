"""Loading needs the memory of the model and about one shard, and takes it only when names fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer
from tests.models.weights.cases import write_official_transformer

SHARD = 16 * 2**20

# Each case in a fork of one warm process: the peak of its resident set, mapped pages of files
# included, above what it began with.
MEASURE = """
import json, os, sys, torch
from hunyuan_fast.models import HunyuanVideoTransformer

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

def measure(place, dtype):
    # A fork has none of the libraries' pages mapped yet: they are not the model's.
    HunyuanVideoTransformer.from_pretrained(f"{root}/warm")
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")
    before = memory("VmRSS")
    model = HunyuanVideoTransformer.from_pretrained(place, dtype=dtype)
    peak, after = memory("VmHWM") - before, memory("VmRSS") - before
    size = sum(value.nbytes for value in model.state_dict().values())
    print(json.dumps({"peak": peak, "after": after, "size": size}), flush=True)

root = sys.argv[1]
HunyuanVideoTransformer.from_pretrained(f"{root}/warm")
for case in sys.argv[2:]:
    layout, dtype = case.split(":")
    child = os.fork()
    if child == 0:
        measure(f"{root}/{layout}", getattr(torch, dtype, None))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
CASES = [
    "native:stored",
    "native:bfloat16",
    "diffusers:stored",
    "diffusers:bfloat16",
    "official:stored",
    "official:bfloat16",
]


def sized(blocks: int) -> HunyuanVideoTransformer:
    torch.manual_seed(0)
    return HunyuanVideoTransformer(
        hidden_size=384,
        heads_num=3,
        mm_double_blocks_depth=blocks,
        mm_single_blocks_depth=blocks,
        text_states_dim=64,
        text_states_dim_2=64,
    )


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Size of the model, peak and remaining memory of every case, in bytes."""
    root = tmp_path_factory.mktemp("sized")
    sized(0).save_pretrained(root / "warm")
    model = sized(4)
    for layout in ("native", "diffusers"):
        model.save_pretrained(root / layout, layout=layout, max_shard_bytes=SHARD)
        assert len(list((root / layout).glob("*-of-*.safetensors"))) >= 8
    write_official_transformer(model, root / "official")
    checkout = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root), *CASES],
        cwd=checkout,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    print(lines)
    return {case: json.loads(line) for case, line in zip(CASES, lines, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_peak_is_the_model_and_a_shard(figures: dict[str, dict[str, int]], case: str) -> None:
    got = figures[case]
    assert got["size"] > (60 if case.endswith("bfloat16") else 120) * 2**20
    assert got["peak"] > 0.9 * got["size"], "the measurement itself is broken"
    # The official file is the only shard: its mapped pages, which the system may drop, all count.
    shard = figures["official:stored"]["size"] if case.startswith("official") else 1.5 * SHARD
    assert got["peak"] <= got["size"] + shard + 0.25 * SHARD, got
    assert got["after"] <= got["size"] + 0.25 * SHARD, got
