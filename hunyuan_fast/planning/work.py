"""What one video takes, wherever it is computed: tokens, parameters, FLOPs, bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.layers import Half, flops_of, layers_of, sizes_of

Kind = Literal["double", "single"]
KINDS: tuple[Kind, Kind] = ("double", "single")
HALVES: tuple[Half, Half] = ("encode", "decode")

# The text models beside the released transformer: a language model of 8.03e9 parameters without
# its head of 0.53e9, and CLIP's text half.
RELEASED_TEXT_PARAMETERS = 7_500_000_000 + 123_000_000
TIME_FEATURES = 256  # of the sinusoids that carry timestep and guidance
REFINER_DEPTH = 2


@dataclass(frozen=True)
class Passes:
    """Reads and writes of what is no matrix product, in vectors of E features for each token.

    split: those inside a tensor-parallel block, of heads and hidden features
    whole: those around it, which only sequence parallelism divides
    """

    split: int
    whole: int


# Forward. Both kinds: norm and modulation 2 (read, write); queries, keys and values normalised,
# rotated and written apart 6; the activation of 4 E hidden features 8; gate and residual sum 3.
# A double block has a gated sum with the next norm between its halves as well: 4.
FORWARD: dict[Kind, Passes] = {"double": Passes(14, 9), "single": Passes(14, 5)}
# Backward. Norm and modulation 3, gate and sum 3, both at once 6; queries, keys, values 6;
# activation 12.
BACKWARD: dict[Kind, Passes] = {"double": Passes(18, 12), "single": Passes(18, 6)}
# Vectors of E features that a block keeps for its backward pass, as tests/models/test_dit_memory.py
# counts them: 21 and 19. split: packed projections 3, q, k, v 3, attention 1, hidden 8 (single:
# first layer 7, q, k, v 3, attention 1, joined 5). Of what is whole, `gathered` are inputs of
# matrices, which sequence parallelism gathers and keeps whole; the rest it divides.
KEPT: dict[Kind, Passes] = {"double": Passes(15, 6), "single": Passes(16, 3)}
GATHERED: dict[Kind, int] = {"double": 2, "single": 1}
# The same at the busiest moment without gradients: in a single block its input, the first layer's
# 7, joined 5 and q, k, v; in a double block input, branch, hidden, and what is around them.
BUSY: dict[Kind, Passes] = {"double": Passes(8, 4), "single": Passes(15, 1)}
# Gradients that live beside what is kept, at the busiest moment of a block's backward pass.
BUSY_BACKWARD: dict[Kind, Passes] = {"double": Passes(12, 3), "single": Passes(15, 2)}
# Kernels of a block, forward.
KERNELS: dict[Kind, int] = {"double": 22, "single": 10}
OUTSIDE_KERNELS = 80  # embeddings, refiner, rotary tables, the last layer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked for: videos of one size, through the transformer once, or a training step.

    videos: made at the same time; in training, samples of a step over all GPUs
    steps: of denoising, for the time of a whole video
    weight_bytes: of one parameter, and of one activation
    text_parameters: of the models that encode the prompt
    """

    model: str
    config: TransformerConfig
    height: int
    width: int
    frames: int
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_tokens: int = 256
    videos: int = 1
    training: bool = False
    steps: int = 50
    weight_bytes: int = 2
    text_parameters: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "videos", "steps", "weight_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text_tokens < 0:
            raise ValueError(f"text_tokens must be at least 0, got {self.text_tokens}")
        unit = self.vae.spatial_compression_ratio
        _, rows, columns = self.config.patch_size
        for name, step in (("height", unit * rows), ("width", unit * columns)):
            if getattr(self, name) % step:
                raise ValueError(f"{name} must be a multiple of {step}, got {getattr(self, name)}")
        if (self.frames - 1) % self.vae.temporal_compression_ratio:
            ratio = self.vae.temporal_compression_ratio
            raise ValueError(f"frames must be {ratio}n + 1, got {self.frames}")

    @cached_property
    def latent(self) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        space = self.vae.spatial_compression_ratio
        time = (self.frames - 1) // self.vae.temporal_compression_ratio + 1
        return time, self.height // space, self.width // space

    @cached_property
    def video_tokens(self) -> int:
        """Tokens of one video."""
        return prod(n // p for n, p in zip(self.latent, self.config.patch_size, strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of one video and its text."""
        return self.video_tokens + self.text_tokens

    def depth(self, kind: Kind) -> int:
        """How many blocks of this kind there are."""
        config = self.config
        return {
            "double": config.mm_double_blocks_depth,
            "single": config.mm_single_blocks_depth,
        }[kind]

    def matrices(self, kind: Kind) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the matrices that a token meets in a block."""
        dim, hidden = self.config.hidden_size, self.config.mlp_width
        if kind == "double":
            return (dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)
        return (dim, 3 * dim + hidden), (dim + hidden, dim)

    def block_parameters(self, kind: Kind) -> int:
        """Parameters of one block, biases and norms included."""
        dim, head = self.config.hidden_size, self.config.head_dim
        linear = sum((inputs + 1) * outputs for inputs, outputs in self.matrices(kind))
        vectors = 6 if kind == "double" else 3
        stream = linear + (dim + 1) * vectors * dim + 2 * head
        return stream * (2 if kind == "double" else 1)

    def split_parameters(self, kind: Kind) -> int:
        """Those of a block that tensor parallelism shares: its matrices, but not the modulation."""
        shared = sum(inputs * outputs for inputs, outputs in self.matrices(kind))
        return shared * (2 if kind == "double" else 1)

    def local_parameters(self, kind: Kind, tp: int) -> int:
        """Parameters of one block on one of `tp` GPUs."""
        shared = self.split_parameters(kind)
        return self.block_parameters(kind) - shared + -(-shared // tp)

    @cached_property
    def other_parameters(self) -> int:
        """Parameters outside the blocks: embeddings, refiner, the last projection."""
        config = self.config
        dim, patch = config.hidden_size, prod(config.patch_size)

        def two_layers(inputs: int) -> int:
            return (inputs + 1) * dim + (dim + 1) * dim

        refiner_block = 4 * dim + (dim + 1) * 4 * dim + (dim + 1) * 4 * dim
        refiner_block += (4 * dim + 1) * dim + (dim + 1) * 2 * dim
        embeddings = (config.in_channels * patch + 1) * dim + two_layers(config.text_states_dim_2)
        embeddings += two_layers(TIME_FEATURES) * (2 if config.guidance_embed else 1)
        text = (config.text_states_dim + 1) * dim + two_layers(TIME_FEATURES)
        text += two_layers(config.text_states_dim) + REFINER_DEPTH * refiner_block
        last = (dim + 1) * config.out_channels * patch + (dim + 1) * 2 * dim
        return embeddings + text + last

    @property
    def patch_parameters(self) -> int:
        """Parameters outside the blocks that every video token meets."""
        config = self.config
        features = (config.in_channels + config.out_channels) * prod(config.patch_size)
        return features * config.hidden_size

    @property
    def text_in_parameters(self) -> int:
        """Parameters outside the blocks that every text token meets."""
        dim = self.config.hidden_size
        return dim * (self.config.text_states_dim + REFINER_DEPTH * 12 * dim)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the transformer."""
        blocks = sum(self.depth(kind) * self.block_parameters(kind) for kind in KINDS)
        return blocks + self.other_parameters

    @cached_property
    def linear_flops(self) -> float:
        """FLOPs of all matrices of the blocks for one video, forward."""
        a_token = sum(
            self.depth(kind) * 2.0 * inputs * outputs
            for kind in KINDS
            for inputs, outputs in self.matrices(kind)
        )
        return a_token * self.tokens

    @cached_property
    def attention_flops(self) -> float:
        """FLOPs of all attention of the blocks for one video, forward."""
        blocks = self.depth("double") + self.depth("single")
        return blocks * 4.0 * self.tokens**2 * self.config.hidden_size

    @property
    def flops(self) -> float:
        """FLOPs of one video through the transformer: forward, in training backward as well.

        Backward has two products for each matrix product of the forward pass, and five for the two
        of attention. What is computed again is not counted.
        """
        if self.training:
            return 3 * self.linear_flops + 3.5 * self.attention_flops
        return self.linear_flops + self.attention_flops

    @property
    def outside_flops(self) -> float:
        """FLOPs outside of the blocks, as ``flops``: patches, and what every text token meets.

        What one row meets, embeddings of the time and vectors of the modulation, is not counted.
        """
        forward = 2.0 * self.video_tokens * self.patch_parameters
        forward += 2.0 * self.text_tokens * self.text_in_parameters
        return 3 * forward if self.training else forward

    @cached_property
    def decode_flops(self) -> float:
        """FLOPs of the autoencoder's decoder for one video, whole, without tiles."""
        layers = layers_of(self.vae, "decode")
        return sum(flops_of(layers, sizes_of(layers, self.latent)))

    @cached_property
    def vae_parameters(self) -> int:
        """Weights of the autoencoder's convolutions and attention, both halves."""
        total = 0
        for half in HALVES:
            layers = layers_of(self.vae, half)
            for index, layer in enumerate(layers):
                taps = 4 if layer.attends else layer.kernel**3
                shortcut = layers[index - 1].inputs if layer.shortcut else 0
                total += layer.outputs * (layer.inputs * taps + shortcut)
        return total

    @property
    def text_flops(self) -> float:
        """FLOPs to encode one prompt, padded to its full length and with the template before it."""
        return 2.0 * self.text_parameters * (256 + 95)


def released(height: int, width: int, frames: int, **more: object) -> Job:
    """A job for the released 13B model."""
    return Job(
        model="13b",
        config=TransformerConfig(),
        height=height,
        width=width,
        frames=frames,
        text_parameters=RELEASED_TEXT_PARAMETERS,
        **more,  # type: ignore[arg-type]
    )
