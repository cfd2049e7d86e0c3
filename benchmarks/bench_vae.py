"""The whole autoencoder against that of diffusers, with the same random weights.

On the CPU both take a clip at a time, without tiles. On a GPU ours takes it whole within a budget:
at 720p not two of the finest maps with 256 channels, 61 GB each, fit beside each other. Diffusers
cuts it into its own default tiles, which is what its users get to see there; pixels then differ,
because norms and borders see a tile, so the difference is shown and judged by nobody.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, Call, Case, Entrant, Peer, Unavailable, Work
from benchmarks.kit.contenders import by_name
from benchmarks.kit.pairing import Rounds
from benchmarks.vae_flops import decode_flops, encode_flops
from hunyuan_fast.dispatch import implementations
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.checkpoint import config_to_diffusers, rules
from hunyuan_fast.models.vae.config import VAEConfig

DECODE, ENCODE = "decode", "encode"
_REAL = VAEConfig()
# The autoencoder of the embedded miniature.
_NANO = VAEConfig(
    latent_channels=8, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4
)
_QUICK = VAEConfig(
    latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
)
# A decode is 15 TFLOP, half a minute and more on two cores; on a GPU 1789 TFLOP are some seconds.
_FEW = Rounds(budget=100.0, least=2, most=3)
_FEW_ON_GPU = Rounds(budget=20.0, least=1, most=5)
# With weights and what the convolution library and the allocator take, below 80 GB.
_GPU_BUDGET = "75GB"
# For 16 bits against fp32, which takes its time.
_PRECISION = shapes.Clip("480p-17f", 17, 480, 848)
# Channels, frames, rows and columns of the convolution that shows what the machine can do.
_PROBE, _QUICK_PROBE, _GPU_PROBE = (256, 9, 66, 66), (16, 4, 18, 18), (256, 9, 182, 322)


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The real architecture and the miniature's; a tiny network when ``quick``."""
    fp32, bf16 = torch.float32, torch.bfloat16
    both = (DECODE, ENCODE)
    if quick:
        clip = shapes.Clip("quick", 5, 32, 32)
        return [
            _case(function, clip, _network(_QUICK, fp32, device), probe=_QUICK_PROBE)
            for function in both
        ]
    if device.type == "cuda":
        half = {dtype: _network(_REAL, dtype, device) for dtype in (bf16, torch.float16)}
        clips = (shapes.PIXELS_480P_65, shapes.PIXELS_720P_129)
        return [
            *(_gpu_case(function, clip, half[bf16]) for clip in clips for function in both),
            *(_gpu_case(function, clips[0], half[torch.float16]) for function in both),
            *(_precision_case(function, network) for network in half.values() for function in both),
        ]
    real, nano = (_network(config, fp32, device) for config in (_REAL, _NANO))
    return [
        _case(DECODE, shapes.PIXELS_256P_17, real, rounds=_FEW, large=True),
        _case(ENCODE, shapes.PIXELS_256P_17, real, rounds=_FEW, large=True),
        _case(DECODE, shapes.PIXELS_512P_IMAGE, real, rounds=_FEW, large=True),
        *(_case(function, shapes.PIXELS_NANO, nano, large=True) for function in both),
    ]


def with_random_weights(vae: HunyuanVideoVAE) -> HunyuanVideoVAE:
    """The VAE with weights of which none is so small that a mistake would hide."""
    generator = torch.Generator(next(vae.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(center, spread, generator=generator)
    return vae.eval()


@cache
def _network(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> "_Network":
    return _Network(config, dtype, device)


@dataclass(frozen=True)
class _Network:
    """Our autoencoder and that of diffusers, which share the memory of their weights."""

    config: VAEConfig
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def native(self) -> HunyuanVideoVAE:
        """Ours with random weights."""
        return with_random_weights(self.empty().to_empty(device=self.device))

    def empty(self) -> HunyuanVideoVAE:
        """Ours without memory for its weights."""
        with torch.device("meta"):
            return HunyuanVideoVAE(**asdict(self.config)).to(self.dtype)

    @cached_property
    def twin(self) -> Any:
        """The class of diffusers; its weights are ours, by the rules that read its checkpoints."""
        if find_spec("diffusers") is None:
            raise Unavailable("diffusers is not installed")
        settings = config_to_diffusers(self.config)
        with torch.device("meta"):
            twin = getattr(import_module("diffusers"), settings.pop("_class_name"))(**settings)
        weights = dict(self.native.named_parameters())
        state = {
            name: rows
            for rule in rules(self.config)
            for name, rows in rule.views(weights[rule.native].detach())
        }
        twin.load_state_dict(state, assign=True)
        return twin.eval()

    @cached_property
    def wide(self) -> HunyuanVideoVAE:
        """The same in fp32, with the values of our weights."""
        vae = self.empty().float().to_empty(device=self.device)
        vae.load_state_dict(self.native.state_dict())
        return vae.eval()

    def ours(self, function: str, budget: str | None = None) -> Call:
        """Our way: the clip, or mean and logarithm of the variance of its latents."""
        return _calls_of(self.native, budget)[function]

    def in_fp32(self, function: str) -> Call:
        """The same in fp32, of the same inputs."""
        call = _calls_of(self.wide, _GPU_BUDGET)[function]
        return lambda x: call(x.float())

    def theirs(self, function: str, *, tiled: bool) -> Call:
        """The way of diffusers, in tiles of its own choice or whole."""
        twin = self.twin

        def decode(z: Tensor) -> Tensor:
            self.tile(tiled)
            result: Tensor = twin.decode(z).sample
            return result

        def encode(video: Tensor) -> tuple[Tensor, Tensor]:
            self.tile(tiled)
            posterior = twin.encode(video).latent_dist
            return posterior.mean, posterior.logvar

        return decode if function == DECODE else encode

    def tile(self, tiled: bool) -> None:
        """Both kinds of call share the one twin."""
        twin = self.twin
        twin.use_tiling = twin.use_framewise_encoding = twin.use_framewise_decoding = tiled

    def inputs(
        self, function: str, clip: shapes.Clip, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Latents as diffusion has them, or a clip of noise in [-1, 1]."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        if function == DECODE:
            z = torch.randn(1, self.config.latent_channels, *clip.latent, **options)
            return (z.to(self.dtype),)
        size = clip.frames, clip.height, clip.width
        return ((2 * torch.rand(1, self.config.in_channels, *size, **options) - 1).to(self.dtype),)


def _calls_of(vae: HunyuanVideoVAE, budget: str | None) -> dict[str, Call]:
    def encode(video: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(video, budget)
        return posterior.mean, posterior.logvar

    return {DECODE: lambda z: vae.decode(z, budget), ENCODE: encode}


def _gpu_case(function: str, clip: shapes.Clip, network: _Network) -> Case:
    """Whole within the budget, with each way to convolve, beside diffusers in its tiles."""
    build = partial(network.ours, function, _GPU_BUDGET)
    named = (
        Entrant(
            f"hunyuan_fast, convolutions by {name}",
            build,
            by_name(network.device, causal_conv3d=names) or nullcontext,
        )
        for name, names in _ways_to_convolve().items()
    )
    case = _case(
        function, clip, network, tiled=True, rounds=_FEW_ON_GPU, large=True, probe=_GPU_PROBE
    )
    return replace(case, ours=(*_unasked(network, build), *named))


def _ways_to_convolve() -> dict[str, str]:
    """Who is asked for, and with whom: the CUDA kernel leaves layers of few channels to others."""
    ways = {"triton_impl": "triton_impl", "library_impl": "library_impl"}
    if "cuda_impl" in implementations("causal_conv3d"):
        ways = {"cuda_impl": "cuda_impl,triton_impl"} | ways
    return ways


def _precision_case(function: str, network: _Network) -> Case:
    """How far 16 bits are from fp32, where a table of rates tells the difference of each."""
    build = partial(network.ours, function, _GPU_BUDGET)
    half = _unasked(network, build) or (
        Entrant("hunyuan_fast by name", build, by_name(network.device) or nullcontext),
    )
    fp32 = Entrant("hunyuan_fast in fp32", partial(network.in_fp32, function), same=False)
    case = _case(function, _PRECISION, network, rounds=_FEW_ON_GPU, probe=_GPU_PROBE)
    return replace(case, ours=(*half, fp32), peers=())


def _unasked(network: _Network, build: Callable[[], Call]) -> tuple[Entrant, ...]:
    """What one gets without asking; until kernels are verified the reference, and this is too much
    for it: nothing then."""
    return () if by_name(network.device) else (Entrant("hunyuan_fast", build),)


def _case(
    function: str,
    clip: shapes.Clip,
    network: _Network,
    *,
    tiled: bool = False,
    rounds: Rounds | None = None,
    large: bool = False,
    probe: tuple[int, int, int, int] = _PROBE,
) -> Case:
    context = by_name(network.device)
    build: Callable[[], Call] = partial(network.ours, function)
    peer = "diffusers tiled" if tiled else "diffusers"
    work, plain = work_of(function, clip, network)
    return Case(
        name=clip.name,
        function=function,
        dtype=network.dtype,
        shape={"B": 1, "T": clip.frames, "H": clip.height, "W": clip.width},
        inputs=partial(network.inputs, function, clip),
        call=lambda *tensors: network.ours(function)(*tensors),
        work={FORWARD: work},
        plain_flops=plain,
        ours=(
            Entrant("hunyuan_fast", build),
            *([Entrant("hunyuan_fast by name", build, context)] if context else []),
        ),
        peers=(Peer(peer, partial(network.theirs, function, tiled=tiled), same=not tiled),),
        cold=False,  # what a call reads and writes is many times a cache
        rounds=rounds,
        large=large,
        conv3d=probe,
    )


def work_of(function: str, clip: shapes.Clip, network: _Network) -> tuple[Work, int]:
    """The least work of a pass, and the FLOPs of the layers as they are written.

    Bytes: the weights of the half that works, the clip and its latents, the latter twice encoded.
    """
    config, latents = network.config, network.config.latent_channels
    pixels = clip.frames, clip.height, clip.width
    t, h, w = clip.latent
    if function == DECODE:
        flops, half = decode_flops(config, clip.latent), "decoder"
    else:
        flops, half, latents = encode_flops(config, pixels), "encoder", 2 * latents
    weights = sum(p.numel() for p in getattr(network.empty(), half).parameters())
    values = clip.frames * clip.height * clip.width * config.in_channels + t * h * w * latents
    return Work((weights + values) * network.dtype.itemsize, flops.least), flops.plain
