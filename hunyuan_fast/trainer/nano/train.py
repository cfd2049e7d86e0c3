"""All stages of the embedded model in order, from random weights to a folder that generates."""

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.text import CLIPTextEncoder, LLMTextEncoder, PromptTemplate
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.pipelines import HunyuanVideoPipeline
from hunyuan_fast.pipelines.settings import GenerationDefaults, PipelineSettings
from hunyuan_fast.trainer.checkpoint import write_atomically
from hunyuan_fast.trainer.curves import draw_curves
from hunyuan_fast.trainer.loop import LoopConfig, Progress, fit, hash_seed
from hunyuan_fast.trainer.nano import recipe as sizes
from hunyuan_fast.trainer.nano.autoencoder import AutoencoderStage, init_autoencoder
from hunyuan_fast.trainer.nano.evaluate import (
    accuracy,
    held_out_prompts,
    reconstruction_psnr,
    run_trials,
)
from hunyuan_fast.trainer.nano.latents import LatentSet, encode_clips
from hunyuan_fast.trainer.nano.recipe import NanoRecipe, Prompting
from hunyuan_fast.trainer.nano.text import (
    ContrastiveModel,
    ContrastiveStage,
    LanguageStage,
    build_clip_text,
    build_llm,
    build_tokenizer,
)
from hunyuan_fast.trainer.nano.transformer import DistillationStage, FlowStage, FrozenPrompts
from hunyuan_fast.trainer.team import Team

RECIPE_FILE = "recipe.json"
FIGURES_FILE = "figures.json"


def train(
    recipe: NanoRecipe,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> Path:
    """Train the miniature and return the folder of the finished pipeline, ``out/model``.

    out: also gets each stage's states and log (``<stage>/log.jsonl``), the clips, the recipe, and
        at the end ``figures.json`` (held-out prompts, clips) and, with matplotlib, ``curves.png``
    resume: go on from what is in ``out``, which must come from the same recipe. On one machine the
        finished weights are the same, bit for bit, wherever the run was interrupted.
    layout: of the processes of the default group, all of which call this and see ``out``. They
        share the transformer in the last two stages; in the others each has samples of its own.
        Batches are the same in any layout, and a run may be resumed in another.
    Raises ValueError for a folder in use without ``resume`` or of another recipe, TrainingError if
    training diverges.
    """
    team = Team.of(layout or Layout(), torch.device(recipe.device))
    team.layout.check_heads(sizes.TRANSFORMER["heads_num"])
    team.by_first(lambda: _claim(recipe, out, resume))
    torch.set_num_threads(recipe.threads)
    return _Run(recipe, out, progress, team).all_stages()


def _claim(recipe: NanoRecipe, out: Path, resume: bool) -> None:
    """Make sure that ``out`` is fresh, or holds the same recipe and is to be resumed."""
    path = out / RECIPE_FILE
    if path.is_file():
        if not resume:
            raise ValueError(
                f"out {str(out)!r} holds a run: add --resume to go on, or name a fresh folder"
            )
        if json.loads(path.read_text()) != asdict(recipe):
            raise ValueError(f"out {str(out)!r} holds another recipe ({path}): name a fresh folder")
        return
    if resume:
        raise ValueError(
            f"out {str(out)!r} holds no run to resume: {path} is missing; start it without --resume"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(recipe), indent=2) + "\n")


class _Run:
    """The stages, each of which uses what the earlier ones made."""

    def __init__(
        self, recipe: NanoRecipe, out: Path, progress: Progress | None, team: Team
    ) -> None:
        self.recipe = recipe
        self.team = team
        self.everybody = team.data_parallel()
        self.out = out
        self.progress = progress
        self.device = torch.device(recipe.device)
        self.tokenizer = build_tokenizer()

    def all_stages(self) -> Path:
        folder = self.out / "model"
        if self.team.by_first((self.out / FIGURES_FILE).is_file):  # written last of all
            return folder
        started = time.perf_counter()
        vae = self.autoencoder()
        clips, images = self.encode(vae, "clips"), self.encode(vae, "images")
        vae.config = _with_scale(vae, clips)
        llm = self.language()
        clip_text = self.contrastive(clips)
        template = PromptTemplate(
            template=Prompting().template,
            crop_start=Prompting().crop_start,
            max_length=Prompting().max_length,
        )
        encoders = (
            LLMTextEncoder(llm, self.tokenizer, template, Prompting().skip_layer),
            CLIPTextEncoder(clip_text, self.tokenizer, Prompting().clip_max_length),
        )
        prompts = FrozenPrompts(*encoders)
        scale = vae.config.scaling_factor
        teacher = self.flow(prompts, images, clips, scale)
        student = self.distill(teacher, prompts, clips, scale)
        settings = PipelineSettings(
            prompt_template=template,
            hidden_state_skip_layer=Prompting().skip_layer,
            clip_max_length=Prompting().clip_max_length,
            generation=GenerationDefaults(
                height=sizes.SIZE, width=sizes.SIZE, num_frames=sizes.FRAMES, fps=8
            ),
        )
        pipeline = HunyuanVideoPipeline(student, vae, *encoders, settings)
        self.team.by_first(lambda: self.store(pipeline, folder))
        self.team.by_first(lambda: self.finish(folder, time.perf_counter() - started))
        return folder

    def store(self, pipeline: HunyuanVideoPipeline, folder: Path) -> None:
        """Write the pipeline in half precision: the package carries these weights."""
        encoders = pipeline.text_encoder.model, pipeline.text_encoder_2.model
        _round_to(torch.bfloat16, pipeline.transformer, *encoders)
        _round_to(torch.float16, pipeline.vae)
        if folder.exists():  # of a run interrupted during its trials
            shutil.rmtree(folder)
        pipeline.save_pretrained(folder)

    def finish(self, folder: Path, seconds: float) -> None:
        """Try the stored model on held-out prompts and clips; write the figures and curves."""
        figures: dict[str, Any] = {"seconds_of_this_run": round(seconds, 1)}
        if self.recipe.trial_prompts:
            pipeline = HunyuanVideoPipeline.from_pretrained(folder, device=self.device)
            prompts = held_out_prompts(self.recipe.trial_prompts)
            figures["held_out_prompts"] = accuracy(
                run_trials(pipeline, prompts, on_batch=self._note("trials"))
            )
            values = reconstruction_psnr(pipeline.vae, seed=4242, count=16)
            figures["held_out_psnr"] = sum(values) / len(values)
        if find_spec("matplotlib") is not None:
            draw_curves(self.out, self.out / "curves.png")
        write_atomically(self.out / FIGURES_FILE, json.dumps(figures, indent=2) + "\n")

    def _note(self, stage: str) -> Callable[[int, int], None] | None:
        """Progress of something that only counts."""
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(stage, done, total, {})

    def _seeded(self, stage: str) -> None:
        torch.manual_seed(hash_seed(self.recipe.seed, stage, "weights"))

    def autoencoder(self) -> HunyuanVideoVAE:
        config, loop = self.recipe.autoencoder()
        self._seeded("vae")
        vae = HunyuanVideoVAE(**sizes.VAE)
        init_autoencoder(vae)
        stage = AutoencoderStage(
            vae.to(self.device), config, seed=self.recipe.seed, share=self.everybody.share
        )
        self.everybody.replicate(stage.network)
        fit(stage, loop, self.out, progress=self.progress, team=self.everybody)
        return vae

    def encode(self, vae: HunyuanVideoVAE, kind: str) -> LatentSet:
        count, frames = {
            "clips": (self.recipe.num_clips, sizes.FRAMES),
            "images": (self.recipe.num_images, 1),
        }[kind]
        return encode_clips(
            vae,
            self.out / "latents" / f"{kind}.safetensors",
            seed=hash_seed(self.recipe.seed, kind),
            count=count,
            frames=frames,
            size=sizes.SIZE,
            progress=self._note(f"encode {kind}"),
            team=self.team,
        )

    def language(self) -> nn.Module:
        self._seeded("llm")
        model = build_llm(self.tokenizer, **sizes.TEXT).to(self.device)
        stage = LanguageStage(model, self.tokenizer, **self._texts())
        self._fit_text(stage, self.recipe.llm_steps)
        return model.model

    def contrastive(self, clips: LatentSet) -> nn.Module:
        self._seeded("clip")
        text = build_clip_text(self.tokenizer, **{**sizes.TEXT, "depth": 2})
        model = ContrastiveModel(text, clips.latents[0], self.everybody.group("dp"))
        stage = ContrastiveStage(model.to(self.device), self.tokenizer, clips, **self._texts())
        self._fit_text(stage, self.recipe.clip_steps)
        return text

    def _texts(self) -> dict[str, Any]:
        recipe = self.recipe
        return {"seed": recipe.seed, "batch": recipe.text_batch, "share": self.everybody.share}

    def _fit_text(self, stage: LanguageStage | ContrastiveStage, steps: int) -> None:
        self.everybody.replicate(stage.module)
        loop = self.recipe.text(steps)
        fit(stage, loop, self.out, progress=self.progress, team=self.everybody)

    def flow(
        self, prompts: FrozenPrompts, images: LatentSet, clips: LatentSet, scale: float
    ) -> HunyuanVideoTransformer:
        config, loop = self.recipe.flow()
        self._seeded("dit")
        model = HunyuanVideoTransformer(**sizes.TRANSFORMER).to(self.device)
        stage = FlowStage(model, prompts, images, clips, config, **self._drawing(scale))
        return self._fit_transformer(stage, loop)

    def distill(
        self,
        teacher: HunyuanVideoTransformer,
        prompts: FrozenPrompts,
        clips: LatentSet,
        scale: float,
    ) -> HunyuanVideoTransformer:
        config, loop = self.recipe.distillation()
        student = copy.deepcopy(teacher)
        stage = DistillationStage(student, teacher, prompts, clips, config, **self._drawing(scale))
        return self._fit_transformer(stage, loop)

    def _drawing(self, scale: float) -> dict[str, Any]:
        return {"scaling_factor": scale, "seed": self.recipe.seed, "share": self.team.share}

    def _fit_transformer(
        self, stage: FlowStage | DistillationStage, loop: LoopConfig
    ) -> HunyuanVideoTransformer:
        """The trained model, whole on every process."""
        self.team.place(stage.module)
        fit(stage, loop, self.out, progress=self.progress, team=self.team)
        return self.team.whole(stage.module)


def _with_scale(vae: HunyuanVideoVAE, clips: LatentSet) -> Any:
    """The VAE's config with the factor that brings the latents to unit variance."""
    factor = 1 / clips.latents.float().std().item()
    return type(vae.config)(**{**asdict(vae.config), "scaling_factor": round(factor, 6)})


def _round_to(dtype: torch.dtype, *modules: nn.Module) -> None:
    for module in modules:
        module.to(dtype)
