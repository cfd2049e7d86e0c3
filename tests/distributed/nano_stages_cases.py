"""The stages of nano that are dealt out by samples: gradients of several processes and of one."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.trainer.nano.autoencoder import AutoencoderConfig, AutoencoderStage, Phase
from hunyuan_fast.trainer.nano.latents import LatentSet, encode_clips
from hunyuan_fast.trainer.nano.text import (
    ContrastiveModel,
    ContrastiveStage,
    LanguageStage,
    build_clip_text,
    build_llm,
    build_tokenizer,
)
from hunyuan_fast.trainer.team import Team

CPU = torch.device("cpu")
BATCH = 5
TEXT = {"width": 16, "depth": 1, "heads": 2}
VAE: dict[str, Any] = {
    "latent_channels": 2,
    "block_out_channels": (4, 4, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def autoencoder() -> HunyuanVideoVAE:
    torch.manual_seed(1)
    return HunyuanVideoVAE(**VAE)


def stage_of(kind: str, team: Team) -> Any:
    """A stage, and its module shared by a team."""
    torch.manual_seed(2)
    drawing: dict[str, Any] = {"seed": 0, "share": team.share}
    if kind == "vae":
        phases = (Phase(steps=9, frames=1, size=16, batch=BATCH),)
        config = AutoencoderConfig(phases=phases, clip_frames=5, clip_size=16)
        stage: Any = AutoencoderStage(autoencoder(), config, **drawing)
        team.replicate(stage.network)
        return stage
    tokenizer = build_tokenizer()
    if kind == "llm":
        model = build_llm(tokenizer, **TEXT)
        stage = LanguageStage(model, tokenizer, batch=BATCH, **drawing)
    else:
        clips = LatentSet(torch.randn(9, 2, 2, 4, 4), seed=1, frames=5)
        text = build_clip_text(tokenizer, **TEXT)
        module = ContrastiveModel(text, clips.latents[0], team.group("dp"))
        stage = ContrastiveStage(module, tokenizer, clips, batch=BATCH, **drawing)
    team.replicate(stage.module)
    return stage


def gradients(kind: str, team: Team) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and its gradients."""
    stage = stage_of(kind, team)
    loss, _ = stage.loss(0)
    loss.backward()
    found = {n: p.grad for n, p in stage.module.named_parameters() if p.grad is not None}
    return team.means({"loss": loss.item()})["loss"], found


def compare(kinds: tuple[str, ...], ranks: int) -> dict[str, tuple[float, float]]:
    """Differences of losses and of gradients from those of one process, in units of the largest."""
    team, found = Team.of(Layout(dp=ranks), CPU), {}
    for kind in kinds:
        with mock.patch.object(torch, "autocast", lambda *_: nullcontext()):
            loss, wanted = gradients(kind, Team())
            many, grads = gradients(kind, team)
        assert grads.keys() == wanted.keys()
        scale = max(x.abs().max().item() for x in wanted.values())
        worst = max((grads[n] - x).abs().max().item() for n, x in wanted.items())
        found[kind] = abs(many / loss - 1), worst / scale
    return found


def encoded(folder: str, ranks: int) -> bool:
    """Whether several processes encode what one does, bit for bit."""
    clips: dict[str, Any] = {"seed": 0, "count": 11, "frames": 1, "size": 16, "batch": 2}
    team, path = Team.of(Layout(dp=ranks), CPU), Path(folder)
    own = encode_clips(autoencoder(), path / f"own-{team.share.index}", **clips).latents
    many = encode_clips(autoencoder(), path / "many", **clips, team=team).latents
    again = encode_clips(autoencoder(), path / "many", **clips, team=team).latents
    return torch.equal(own, many) and torch.equal(own, again)
