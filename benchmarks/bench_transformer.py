"""The whole transformer against that of diffusers, with the same weights: steps of both kinds.

A denoising step is a velocity and what the sampler makes of it. A training step is forward and
backward of the first two double and four single blocks, with what stands around them, as those of
all sixty fit no GPU. At 118,800 video tokens a step takes so long that everyone is called twice:
once to compile, to compare and to see the peak of memory, once against the clock.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.kit.case import (
    FORWARD,
    TRAINING,
    Call,
    Case,
    Entrant,
    Peer,
    Unavailable,
    Weighted,
    Work,
)
from benchmarks.kit.contenders import by_name
from benchmarks.kit.pairing import Rounds
from benchmarks.transformer_twins import Source, Twins, twins
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.planning.work import Job
from hunyuan_fast.samplers import embedded_guidance, euler_step, shifted_sigmas, timesteps

DENOISE, DENOISE_FP8, TRAIN = "denoising_step", "denoising_step_fp8", "training_step"
REAL = TransformerConfig()
# What a training step is measured with.
FEW_BLOCKS = replace(REAL, mm_double_blocks_depth=2, mm_single_blocks_depth=4)
_NANO = TransformerConfig(
    hidden_size=shapes.NANO_HIDDEN_SIZE,
    heads_num=shapes.NANO_NUM_HEADS,
    mm_double_blocks_depth=3,
    mm_single_blocks_depth=6,
    rope_dim_list=shapes.NANO_ROPE_DIMS,
    in_channels=8,
    out_channels=8,
    text_states_dim=128,
    text_states_dim_2=128,
)
_QUICK = replace(
    REAL,
    hidden_size=384,
    heads_num=3,
    mm_double_blocks_depth=4,
    mm_single_blocks_depth=8,
    text_states_dim=96,
    text_states_dim_2=48,
)
_STEPS, _STEP, _GUIDANCE = 50, 10, 6.0  # one step of a whole video, somewhere in the middle
_FEW = Rounds(budget=20.0, least=3, most=10)
_TWICE = Rounds(budget=420.0, least=1, most=1)
# Of longer clips, and of gradients in 16 bits, differences are told and judged by nobody: over so
# many tokens of noise attention makes next to nothing, and some gradients are sums that cancel;
# roundings make the rest.
_JUDGED = shapes.CLIP_256P_65.video


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The 13B model on a GPU, the miniature on a CPU; a narrow one when ``quick``."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        clip = shapes.tokens("quick", 1, 128, 128, text=32)
        source = Source(_QUICK, bf16 if device.type == "cuda" else fp32, device)
        return [_denoise(clip, source, quick=True), _train(clip, source)]
    if device.type == "cuda":
        clips = (shapes.CLIP_256P_65, shapes.CLIP_480P_65, shapes.CLIP_720P_129)
        whole, few = (Source(config, bf16, device) for config in (REAL, FEW_BLOCKS))
        return [
            *(_denoise(clip, whole) for clip in clips),
            *(_denoise_fp8(clip, whole) for clip in clips),
            *(_train(clip, few) for clip in clips),
        ]
    nano = [Source(_NANO, dtype, device, pretrained="nano") for dtype in (fp32, bf16)]
    return [make(shapes.NANO_PADDED, each) for make in (_denoise, _train) for each in nano]


@dataclass(frozen=True)
class _Step:
    """One step of a clip by either model."""

    clip: shapes.Tokens
    source: Source

    @property
    def twins(self) -> Twins:
        return twins(self.source)

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Latents in float32, as samplers keep them, states of the text, its pooled vector."""
        config, device = self.source.config, generator.device
        t, h, w = (n * p for n, p in zip(self.clip.grid, config.patch_size, strict=True))
        options: dict[str, Any] = {"generator": generator, "device": device}
        latents = torch.randn(1, config.in_channels, t, h, w, **options)
        states = torch.randn(1, self.clip.text, config.text_states_dim, **options)
        pooled = torch.randn(1, config.text_states_dim_2, **options)
        return latents, states.to(self.source.dtype), pooled.to(self.source.dtype)

    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise levels of a video, the time of the step, the mask of the text, the guidance."""
        device = self.source.device
        sigmas = shifted_sigmas(_STEPS).to(device)
        mask = torch.arange(self.clip.text, device=device)[None] < self.clip.filled
        guidance = embedded_guidance(_GUIDANCE, 1, dtype=self.source.dtype, device=device)
        return sigmas, timesteps(sigmas)[_STEP : _STEP + 1], mask, guidance

    def velocity_of_ours(self, **how: bool) -> "_Model":
        model, dtype = self.twins.ours(**how), self.source.dtype
        _, timestep, mask, guidance = self.constants()

        def call(latents: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
            velocity: Tensor = model(latents.to(dtype), timestep, states, mask, pooled, guidance)
            return velocity

        return _Model(call, model)

    def velocity_of_theirs(self, **how: bool) -> "_Model":
        twin, dtype = self.twins.theirs(**how), self.source.dtype
        _, timestep, mask, guidance = self.constants()

        def call(latents: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
            text = states, mask, pooled, guidance
            velocity: Tensor = twin(latents.to(dtype), timestep, *text, return_dict=False)[0]
            return velocity

        return _Model(call, twin)

    def ours(self, **how: bool) -> Call:
        """Our denoising step: the velocity, and the latents of the next noise level."""
        velocity_of = self.velocity_of_ours(**how)
        sigmas, *_ = self.constants()

        def call(latents: Tensor, *text: Tensor) -> tuple[Tensor, Tensor]:
            velocity = velocity_of(latents, *text)
            return velocity, euler_step(latents, velocity, sigmas[_STEP], sigmas[_STEP + 1])

        return call

    def theirs(self, **how: bool) -> Call:
        """Theirs, with their sampler."""
        velocity_of = self.velocity_of_theirs(**how)
        sigmas, timestep, *_ = self.constants()
        scheduler = import_module("diffusers").FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist(), device=self.source.device)
        scheduler.set_begin_index(_STEP)

        def call(latents: Tensor, *text: Tensor) -> tuple[Tensor, Tensor]:
            velocity = velocity_of(latents, *text)
            # a copy, as it counts its steps
            step = copy(scheduler).step(velocity, timestep, latents, return_dict=False)
            return velocity, step[0]

        return call

    def trained_ours(self, **how: bool) -> Weighted:
        call = self.velocity_of_ours(**how)
        return Weighted(call, self.twins.weights_of_ours(call.model), tuple)

    def trained_theirs(self, **how: bool) -> Weighted:
        call = self.velocity_of_theirs(**how)
        return Weighted(call, self.twins.weights_of_theirs(call.model), self.twins.join)

    def shape(self) -> dict[str, int]:
        config = self.source.config
        return {
            "B": 1,
            "V": self.clip.video,
            "T": self.clip.text,
            "E": config.hidden_size,
            "double": config.mm_double_blocks_depth,
            "single": config.mm_single_blocks_depth,
        }


@dataclass(frozen=True)
class _Model:
    """A call, and the module that it calls."""

    call: Callable[..., Tensor]
    model: Any

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


def _denoise(clip: shapes.Tokens, source: Source, *, quick: bool = False) -> Case:
    step, compiled = _Step(clip, source), partial(_compiled, quick)
    ours = Entrant("hunyuan_fast compiled", partial(compiled, step.ours), _kernels(step))
    peers = (
        Peer("diffusers", step.theirs),
        Peer("diffusers compiled", partial(compiled, step.theirs)),
    )
    return _case(DENOISE, step, (*_plain(step, step.ours), ours), peers)


def _denoise_fp8(clip: shapes.Tokens, source: Source) -> Case:
    """Ours alone, in eight bits where it has them: other results by design."""
    step = _Step(clip, source)
    ways = {
        "fp8 attention": {"fp8_attention": True},
        "fp8 weights": {"fp8_weights": True},
        "fp8 attention and weights": {"fp8_attention": True, "fp8_weights": True},
    }
    eight = (
        Entrant(name, partial(step.ours, **how), _kernels(step), same=False)
        for name, how in ways.items()
    )
    return _case(DENOISE_FP8, step, (_plain(step, step.ours)[-1], *eight), ())


def _train(clip: shapes.Tokens, source: Source) -> Case:
    step, name = _Step(clip, source), "checkpointing"
    ours, theirs = (
        partial(f, checkpointing=True) for f in (step.trained_ours, step.trained_theirs)
    )
    case = _case(
        TRAIN,
        step,
        (
            *_plain(step, step.trained_ours),
            Entrant(f"hunyuan_fast {name}", ours, _kernels(step)),
        ),
        (Peer("diffusers", step.trained_theirs), Peer(f"diffusers {name}", theirs)),
    )
    # It is asked for the shape and dtype of a velocity, nothing else.
    return replace(case, call=lambda latents, *_: latents.to(source.dtype))


def _case(function: str, step: _Step, ours: tuple[Entrant, ...], peers: tuple[Peer, ...]) -> Case:
    clip, source = step.clip, step.source
    on_gpu, longest = source.device.type == "cuda", clip.video >= shapes.CLIP_720P_129.video
    judged = clip.video <= _JUDGED and (function != TRAIN or source.dtype == torch.float32)
    return Case(
        name=clip.name,
        function=function,
        dtype=source.dtype,
        shape=step.shape(),
        inputs=step.inputs,
        call=lambda *tensors: step.ours()(*tensors),
        work=work(step, TRAINING if function == TRAIN else FORWARD),
        ours=tuple(replace(each, same=each.same and judged) for each in ours),
        peers=tuple(replace(each, same=judged) for each in peers),
        cold=False,  # the 13B model leaves no cache warm, and the miniature is used warm
        rounds=(_TWICE if longest else _FEW) if on_gpu else None,
        once=on_gpu and longest,
        large=on_gpu,
    )


def _kernels(step: _Step) -> Callable[[], AbstractContextManager[object]]:
    """The best kernels, by name until all are verified."""
    return by_name(step.source.device) or nullcontext


def _plain(step: _Step, build: Callable[[], Call]) -> tuple[Entrant, ...]:
    """What one gets without asking, and the kernels by name until they are verified.

    The reference, which then answers by itself, is no match for the longer clips.
    """
    unasked, kernels = Entrant("hunyuan_fast", build), _kernels(step)
    if kernels is nullcontext:
        return (unasked,)
    named = Entrant("hunyuan_fast by name", build, kernels)
    return (unasked, named) if step.clip.video <= _JUDGED else (named,)


def _compiled(quick: bool, build: Callable[..., Call]) -> Call:
    if quick:
        raise Unavailable("a quick run has no time to compile the blocks")
    return build(compiled=True)


def job_of(step: _Step, *, training: bool) -> Job:
    """The step as plans have it: padding of the text is nobody's work."""
    t, h, w = step.clip.grid
    return Job(
        model=step.clip.name,
        config=step.source.config,
        height=16 * h,
        width=16 * w,
        frames=4 * (t - 1) + 1,
        text_tokens=step.clip.filled,
        training=training,
        weight_bytes=step.source.dtype.itemsize,
    )


def work(step: _Step, what: str) -> dict[str, Work]:
    """The least work of a step: FLOPs as plans count them.

    Bytes: weights once, in training once more and their gradients; latents in, in training at the
    weights' dtype, and velocity and latents out.
    """
    job = job_of(step, training=what == TRAINING)
    weights = job.parameters * job.weight_bytes
    values = step.source.config.in_channels
    for size in job.latent:
        values *= size
    if what == TRAINING:
        num_bytes = 3 * weights + 3 * values * job.weight_bytes
    else:
        num_bytes = weights + values * (4 + 4 + job.weight_bytes)
    return {what: Work(num_bytes, int(job.flops + job.outside_flops))}
