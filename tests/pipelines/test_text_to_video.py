"""The text-to-video pipeline: against diffusers' pipeline, against itself, and when it fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.models.text import PromptTemplate
from hunyuan_fast.pipelines import GenerationDefaults, HunyuanVideoPipeline, PipelineSettings
from tests.kit.pipeline import DEFAULTS, tiny_pipeline
from tests.kit.text import TEMPLATE

PROMPTS = ["a red circle moving right", "blue"]
NEGATIVE = "still, grey"
LATENTS = (2, 4, 3, 4, 6)


@pytest.fixture(scope="module")
def pipe() -> HunyuanVideoPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def diffusers_pipe(pipe: HunyuanVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' own pipeline, read from the folder that ours writes for it."""
    from diffusers import HunyuanVideoPipeline as DiffusersPipeline

    folder = tmp_path_factory.mktemp("pipelines") / "diffusers"
    pipe.save_pretrained(folder, layout="diffusers")
    theirs = DiffusersPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def run_diffusers(pipeline: Any, noise: Tensor, **arguments: Any) -> Tensor:
    result = pipeline(
        prompt=PROMPTS,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        latents=noise,
        prompt_template={"template": TEMPLATE.template, "crop_start": TEMPLATE.crop_start},
        max_sequence_length=TEMPLATE.max_length,
        **arguments,
    ).frames
    return torch.as_tensor(result)


@pytest.mark.parametrize("output_type", ["latent", "float"])
@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.5])
def test_equals_the_pipeline_of_diffusers(
    pipe: HunyuanVideoPipeline,
    diffusers_pipe: Any,
    generator: torch.Generator,
    output_type: str,
    true_cfg_scale: float,
) -> None:
    noise = torch.randn(LATENTS, generator=generator)
    negative = NEGATIVE if true_cfg_scale > 1 else None
    ours = pipe(
        PROMPTS,
        num_inference_steps=4,
        shift=7.0,
        guidance_scale=6.0,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=negative,
        latents=noise,
        output_type=output_type,
    )
    theirs = run_diffusers(
        diffusers_pipe,
        noise,
        guidance_scale=6.0,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=None if negative is None else [negative] * 2,
        output_type="latent" if output_type == "latent" else "np",
    )
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    # the latents have moved from the noise, so that equality means something
    if output_type == "latent":
        assert (ours - noise).abs().mean() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4


def test_guidance_shift_and_prompt_change_the_result(pipe: HunyuanVideoPipeline) -> None:
    def run(prompt: str = "a star", **change: Any) -> Tensor:
        return pipe(prompt, num_inference_steps=3, output_type="latent", **change)

    base = run()
    changes: list[dict[str, Any]] = [
        {"prompt": "a square"},
        {"guidance_scale": 1.0},
        {"shift": 2.0},
        {"seed": 1},
        {"true_cfg_scale": 2.0},
        {"true_cfg_scale": 2.0, "negative_prompt": "grey"},
    ]
    results = [base, *(run(**change) for change in changes)]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert (a - b).abs().max() > 1e-4


def test_default_negative_prompt_is_the_empty_one(pipe: HunyuanVideoPipeline) -> None:
    runs = [
        pipe("a star", num_inference_steps=2, true_cfg_scale=2.0, negative_prompt=negative)
        for negative in (None, "", [""])
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_batch_of_two_equals_two_single_runs(
    pipe: HunyuanVideoPipeline, true_cfg_scale: float
) -> None:
    common: dict[str, Any] = {
        "num_inference_steps": 3,
        "true_cfg_scale": true_cfg_scale,
        "output_type": "float",
    }
    both = pipe(PROMPTS, seed=7, **common)
    for index, prompt in enumerate(PROMPTS):
        one = pipe(prompt, seed=7 + index, **common)
        assert (one[0] - both[index]).abs().max() <= 1e-5


def test_videos_of_one_prompt_use_consecutive_seeds(pipe: HunyuanVideoPipeline) -> None:
    common: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    four = pipe(PROMPTS, num_videos=2, seed=3, **common)
    assert four.shape == (4, *LATENTS[1:])
    for index, prompt in enumerate([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]):
        one = pipe(prompt, seed=3 + index, **common)
        assert (one[0] - four[index]).abs().max() <= 1e-5
    assert (four[0] - four[1]).abs().max() > 0.1


def test_same_seed_same_video_and_no_touch_of_the_global_generator(
    pipe: HunyuanVideoPipeline,
) -> None:
    state = torch.get_rng_state()
    first = pipe("a star", num_inference_steps=2)
    torch.manual_seed(1234)
    assert torch.equal(first, pipe("a star", num_inference_steps=2))
    torch.set_rng_state(state)
    pipe("a star", num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs(pipe: HunyuanVideoPipeline) -> None:
    frames = pipe("a star", num_inference_steps=2)
    assert frames.dtype == torch.uint8 and frames.shape == (1, 9, 32, 48, 3)
    assert frames.is_contiguous() and frames.device.type == "cpu"
    assert len(frames.unique()) > 20
    real = pipe("a star", num_inference_steps=2, output_type="float")
    assert real.dtype == torch.float32 and real.min() >= 0 and real.max() <= 1
    assert torch.equal(frames, (real * 255).to(torch.uint8))


def test_image(pipe: HunyuanVideoPipeline) -> None:
    frames = pipe("a star", num_frames=1, num_inference_steps=2)
    assert frames.shape == (1, 1, 32, 48, 3)


def test_image_template_is_used_for_one_frame(pipe: HunyuanVideoPipeline) -> None:
    image = PromptTemplate(template="{}<|end|>", crop_start=1, max_length=40)
    settings = PipelineSettings(
        prompt_template=TEMPLATE, image_prompt_template=image, generation=DEFAULTS
    )
    other = HunyuanVideoPipeline(
        pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, settings
    )
    common: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    assert (other("a", num_frames=1, **common) - pipe("a", num_frames=1, **common)).abs().max() > 0
    assert torch.equal(other("a", **common), pipe("a", **common))


def test_none_takes_the_defaults_of_the_settings(pipe: HunyuanVideoPipeline) -> None:
    steps = []
    implicit = pipe(
        "a star",
        num_inference_steps=None,
        guidance_scale=None,
        output_type="latent",
        progress=lambda stage, step, total: steps.append(total) if stage == "denoise" else None,
    )
    assert set(steps) == {3}
    explicit = pipe(
        "a star",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=3,
        guidance_scale=6.0,
        shift=17.0,
        output_type="latent",
    )
    assert torch.equal(implicit, explicit)


def test_progress_is_told_every_step(pipe: HunyuanVideoPipeline) -> None:
    told: list[tuple[str, int, int]] = []
    pipe(PROMPTS, num_inference_steps=3, progress=lambda *event: told.append(event))
    assert told == [
        ("encode", 0, 1),
        ("encode", 1, 1),
        *(("denoise", step, 3) for step in range(4)),
        *(("decode", sample, 2) for sample in range(3)),
    ]


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_interrupt_leaves_the_pipeline_usable(pipe: HunyuanVideoPipeline, stage: str) -> None:
    expected = pipe("a star", num_inference_steps=2)

    def interrupt(current: str, step: int, total: int) -> None:
        if current == stage and step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a star", num_inference_steps=2, height=272, progress=interrupt)
    assert pipe.vae.tiling is None
    assert torch.is_grad_enabled()
    assert torch.equal(pipe("a star", num_inference_steps=2), expected)


def test_large_clip_is_decoded_in_official_tiles(
    pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    decode = pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae, "decode", lambda z, **_: used.append(pipe.vae.tiling) or decode(z)
    )
    for size in ({"height": 256}, {"height": 272}, {"width": 272}, {"num_frames": 69}):
        pipe("a star", num_inference_steps=1, **{"height": 16, "width": 16, **size})
        assert pipe.vae.tiling is None
    pipe.vae.enable_tiling("official")
    official = pipe.vae.tiling
    pipe.vae.enable_tiling("diffusers")
    chosen = pipe.vae.tiling
    pipe("a star", num_inference_steps=1, height=272, width=16)
    assert pipe.vae.tiling is chosen
    pipe.vae.disable_tiling()
    assert used == [None, official, official, official, chosen]


class Breaks:
    """Forward hook that spoils the output of one call."""

    def __init__(self, at: int, value: float) -> None:
        self.calls, self.at, self.value = 0, at, value

    def __call__(self, module: object, inputs: object, output: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            output = output.clone()
            output.view(-1)[5] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("at", "named"),
    [(1, "denoising step 1 of 4"), (3, "denoising step 4 of 4"), (4, "step 4 of 4")],
)
def test_non_finite_velocity_names_the_step(
    pipe: HunyuanVideoPipeline, at: int, named: str, value: float
) -> None:
    hook = pipe.transformer.register_forward_hook(Breaks(at, value))
    try:
        with pytest.raises(FloatingPointError, match=named):
            pipe("a star", num_inference_steps=4)
    finally:
        hook.remove()


def test_non_finite_text_and_video_are_named(
    pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = pipe.vae.decode
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda z, **_: decode(z) * float("nan"))
        with pytest.raises(FloatingPointError, match="the decoded video 0 holds nan"):
            pipe("a star", num_inference_steps=1)
    encode = pipe.text_encoder_2.encode
    with monkeypatch.context() as patch:
        patch.setattr(pipe.text_encoder_2, "encode", lambda texts: encode(texts) / 0)
        with pytest.raises(FloatingPointError, match="CLIP text model holds"):
            pipe("a star", num_inference_steps=1)


def test_bfloat16_keeps_latents_and_time_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    low = tiny_pipeline()
    low.transformer.bfloat16()
    seen = []

    def look(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0].dtype, args[1].dtype, kwargs["guidance"].tolist()))

    low.transformer.register_forward_pre_hook(look, with_kwargs=True)
    low("a star", num_inference_steps=1, guidance_scale=6.0, output_type="latent")
    got = low("a star", num_inference_steps=3, guidance_scale=4.0, output_type="latent")
    assert seen == [(torch.bfloat16, torch.float32, [guidance]) for guidance in (6016, *[4000] * 3)]
    assert got.dtype == torch.float32
    # a float32 result holds values that bfloat16 cannot
    assert not torch.equal(got, got.bfloat16().float())
    full = tiny_pipeline()(
        "a star", num_inference_steps=3, guidance_scale=4.0, output_type="latent"
    )
    assert (got - full).abs().max() < 0.1 * full.abs().max()


def test_model_without_guidance_embedding() -> None:
    plain = tiny_pipeline(guidance_embed=False)
    default = plain("a star", num_inference_steps=2, output_type="latent")
    one = plain("a star", num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    assert torch.equal(default, one)
    with pytest.raises(ValueError, match=r"guidance_scale must be left at 6.*use true_cfg_scale"):
        plain("a star", guidance_scale=3.0)


def test_parts_of_different_models_are_refused(pipe: HunyuanVideoPipeline) -> None:
    from hunyuan_fast.models import HunyuanVideoVAE
    from tests.kit.pipeline import VAE

    vae = HunyuanVideoVAE(**{**VAE, "latent_channels": 8})
    with pytest.raises(ValueError, match=r"vae\.latent_channels must have the width"):
        HunyuanVideoPipeline(
            pipe.transformer, vae, pipe.text_encoder, pipe.text_encoder_2, pipe.settings
        )
    settings = PipelineSettings(
        prompt_template=TEMPLATE, generation=GenerationDefaults(height=40, width=48, num_frames=9)
    )
    with pytest.raises(ValueError, match=r"settings\.generation\.height must be a multiple of 16"):
        HunyuanVideoPipeline(
            pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, settings
        )


def test_gradients_are_off(pipe: HunyuanVideoPipeline) -> None:
    out = pipe("a star", num_inference_steps=1, output_type="latent")
    assert not out.requires_grad


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_round_trip_through_a_folder(
    pipe: HunyuanVideoPipeline, tmp_path: Path, layout: Any
) -> None:
    pipe.save_pretrained(tmp_path / "model", layout=layout)
    again = HunyuanVideoPipeline.from_pretrained(tmp_path / "model")
    size: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    assert again.settings.prompt_template == TEMPLATE
    if layout == "native":
        assert again.settings == pipe.settings
    assert torch.equal(again("a star", **size), pipe("a star", **size))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_saving_is_all_or_nothing(
    pipe: HunyuanVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.text_encoder_2, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="path must be new or an empty folder"):
        pipe.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match='layout must be "native" or "diffusers", got'):
        pipe.save_pretrained(tmp_path / "other", layout="official")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_gpu_gives_the_video_of_the_cpu(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    expected = pipe("a star", num_inference_steps=3, output_type="latent")
    got = pipe.to("cuda")("a star", num_inference_steps=3, output_type="latent")
    assert got.device.type == "cpu"
    assert (got - expected).abs().max() <= 1e-2 * expected.abs().max()
    pipe.to("cpu").save_pretrained(tmp_path / "model")
    low = HunyuanVideoPipeline.from_pretrained(tmp_path / "model", device="cuda")
    assert low.dtype == torch.bfloat16 and next(low.vae.parameters()).dtype == torch.float16
    assert low("a star", num_inference_steps=2).shape == (1, 9, 32, 48, 3)
