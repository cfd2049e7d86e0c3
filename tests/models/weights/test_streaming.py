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

# Peak of the resident set, mapped pages of files included, above what the warm process had.
MEASURE = """
import json, sys, torch
from hunyuan_fast.models import HunyuanVideoTransformer

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

warm, place, dtype = sys.argv[1:]
HunyuanVideoTransformer.from_pretrained(warm)
with open("/proc/self/clear_refs", "w") as switch:
    switch.write("5")
before = memory("VmRSS")
model = HunyuanVideoTransformer.from_pretrained(place, dtype=getattr(torch, dtype, None))
peak, after = memory("VmHWM") - before, memory("VmRSS") - before
size = sum(value.nbytes for value in model.state_dict().values())
print(json.dumps({"peak": peak, "after": after, "size": size}))
"""


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
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sized")
    sized(0).save_pretrained(root / "warm")
    model = sized(4)
    for layout in ("native", "diffusers"):
        model.save_pretrained(root / layout, layout=layout, max_shard_bytes=SHARD)
    write_official_transformer(model, root / "official")
    return root


def measure(places: Path, layout: str, dtype: str) -> dict[str, int]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    environment["OMP_NUM_THREADS"] = "1"
    arguments = [str(places / "warm"), str(places / layout), dtype]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    figures: dict[str, int] = json.loads(result.stdout)
    return figures


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_peak_is_the_model_and_a_shard(places: Path, layout: str, dtype: str) -> None:
    assert len(list((places / layout).glob("*-of-*.safetensors"))) >= 8
    figures = measure(places, layout, dtype)
    assert figures["size"] > (60 if dtype == "bfloat16" else 120) * 2**20
    assert figures["peak"] > 0.9 * figures["size"], "the measurement itself is broken"
    assert figures["peak"] <= figures["size"] + 1.5 * SHARD, figures
    assert figures["after"] <= figures["size"] + 0.5 * SHARD, figures


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_official_file_counts_as_one_shard(places: Path) -> None:
    figures = measure(places, "official", "bfloat16")
    stored = (places / "official").rglob("*.pt")
    file_size = sum(file.stat().st_size for file in stored)
    assert figures["peak"] <= figures["size"] + file_size + 0.5 * SHARD, figures
    assert figures["after"] <= figures["size"] + 0.5 * SHARD, figures
