"""What is counted for one video is what the models have and do."""

import subprocess
import sys

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer, HunyuanVideoVAE
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.planning.layouts import Layout
from hunyuan_fast.planning.memory import memory
from hunyuan_fast.planning.work import Job, released


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_released_model() -> None:
    """12.82 B parameters; 118,800 video tokens and 12.07 PFLOP a step at 720p and 129 frames."""
    job = released(720, 1280, 129)
    with torch.device("meta"):
        assert job.parameters == parameters(HunyuanVideoTransformer()) == 12_821_012_544
        vae = parameters(HunyuanVideoVAE())
    assert job.vae_parameters == pytest.approx(vae, rel=1e-3)  # but for norms and biases
    assert job.video_tokens == 118_800 and job.tokens == 119_056
    assert job.flops == pytest.approx(12.068e15, rel=1e-4)
    assert job.attention_flops / job.flops == pytest.approx(0.866, abs=1e-3)
    training = released(720, 1280, 129, training=True)
    assert training.flops == pytest.approx(41.4e15, rel=1e-3)


@pytest.mark.parametrize("guidance", [False, True])
def test_parameters_of_a_small_model(guidance: bool) -> None:
    config = TransformerConfig(
        hidden_size=48,
        heads_num=3,
        mlp_width_ratio=2.0,
        mm_double_blocks_depth=2,
        mm_single_blocks_depth=1,
        rope_dim_list=(4, 6, 6),
        in_channels=5,
        out_channels=4,
        text_states_dim=7,
        text_states_dim_2=9,
        guidance_embed=guidance,
    )
    job = Job(model="small", config=config, height=32, width=32, frames=5)
    with torch.device("meta"):
        model = HunyuanVideoTransformer(**vars(config))
    assert job.parameters == parameters(model)
    double, single = model.double_blocks[0], model.single_blocks[0]
    assert job.block_parameters("double") == parameters(double)
    assert job.block_parameters("single") == parameters(single)
    # one of three tensor-parallel ranks has a third of the matrices, and all of the rest
    matrices = single.linear1.weight.numel() + single.linear2.weight.numel()
    assert job.split_parameters("single") == matrices
    assert job.block_parameters("single") - job.local_parameters("single", 3) == matrices * 2 // 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"height": 721}, "height must be a multiple of 16, got 721"),
        ({"frames": 128}, "frames must be 4n \\+ 1, got 128"),
        ({"videos": 0}, "videos must be at least 1, got 0"),
        ({"text_tokens": -1}, "text_tokens must be at least 0, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        released(**{"height": 720, "width": 1280, "frames": 129, **more})


def test_kept_vectors_are_those_of_the_blocks() -> None:
    """tests/models/test_dit_memory.py measures 21 and 19 vectors a token; so does the plan."""
    job = released(128, 128, 13, training=True)
    unit = job.tokens * 3072 * 2
    assert memory(Layout(), job).kept == (20 * 21 + 40 * 19) * unit
    assert memory(Layout(recompute=True), job).kept == (60 + 21) * unit


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from hunyuan_fast.planning import published, search; "
        "sys.exit(int('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
