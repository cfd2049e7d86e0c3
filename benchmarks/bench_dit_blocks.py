"""Whole blocks of the transformer against those of diffusers, with the same weights.

Both kinds of block take and return two streams, as diffusers' do. Our single-stream block works on
one joint stream, which the model joins once before all of them; here it pays for joining and
parting in every call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.kit.case import (
    FORWARD,
    TRAINING,
    Case,
    Entrant,
    Peer,
    Unavailable,
    Weighted,
    Work,
    compiled,
)
from benchmarks.kit.contenders import by_name
from hunyuan_fast import dispatch
from hunyuan_fast.models.dit.blocks import DoubleStreamBlock, SingleStreamBlock
from hunyuan_fast.models.dit.checkpoint import rules
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.weights.rule import Rule
from hunyuan_fast.modules.rotary import build_rotary_tables

DOUBLE, SINGLE = "double_block", "single_block"
_ATTENTION = "rope3d_attention"
# Our class, its prefix in the names of our parameters, and the counterparts of both in diffusers.
_KINDS: dict[str, tuple[type[nn.Module], str, str, str]] = {
    DOUBLE: (
        *(DoubleStreamBlock, "double_blocks.0."),
        *("HunyuanVideoTransformerBlock", "transformer_blocks.0."),
    ),
    SINGLE: (
        *(SingleStreamBlock, "single_blocks.0."),
        *("HunyuanVideoSingleTransformerBlock", "single_transformer_blocks.0."),
    ),
}
_FILLED = shapes.FILLED
_QUICK_WIDTH, _QUICK_HEADS = 384, 3

Streams = tuple[Tensor, Tensor]


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Both kinds of block at the widths of the 13B model; narrow ones when ``quick``."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        small = shapes.tokens("quick", 1, 128, 128, text=32)
        # Kernels of a GPU are made for half precision.
        dtype = bf16 if device.type == "cuda" else fp32
        settings = [(small, _QUICK_WIDTH, _QUICK_HEADS, dtype)]
    elif device.type == "cuda":
        clips = [shapes.CLIP_256P_65, shapes.CLIP_720P_129]
        if by_name(device):
            # Until all kernels are verified the reference answers, which is no match for this.
            clips.remove(shapes.CLIP_720P_129)
        settings = [(clip, shapes.HIDDEN_SIZE, shapes.NUM_HEADS, bf16) for clip in clips]
    else:
        clip = shapes.CLIP_128P_13
        settings = [(clip, shapes.HIDDEN_SIZE, shapes.NUM_HEADS, dtype) for dtype in (fp32, bf16)]
    return [
        _case(_Pair(kind, *setting, device), quick=quick) for setting in settings for kind in _KINDS
    ]


@dataclass(frozen=True)
class _Pair:
    """A block of ours and its counterpart, which share the memory of their weights."""

    kind: str
    clip: shapes.Tokens
    width: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device

    @property
    def valid(self) -> int:
        """Tokens that take part: all of the video, and the text that is not padding."""
        return self.clip.video + int(self.clip.text * _FILLED)

    @cached_property
    def config(self) -> TransformerConfig:
        return TransformerConfig(
            hidden_size=self.width,
            heads_num=self.num_heads,
            mm_double_blocks_depth=1,
            mm_single_blocks_depth=1,
        )

    @cached_property
    def rules(self) -> list[Rule]:
        """What every parameter of the block is called in diffusers."""
        return [r for r in rules(self.config) if r.native.startswith(_KINDS[self.kind][1])]

    @cached_property
    def native(self) -> nn.Module:
        """Our block with random weights, none of them so small that a mistake would hide."""
        block = self.empty().to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                center = 1.0 if name.endswith("norm.weight") else 0.0
                spread = 0.7 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.2
                parameter.normal_(center, spread, generator=generator)
        return block

    def empty(self) -> nn.Module:
        """Our block without memory for its weights."""
        with torch.device("meta"):
            block = _KINDS[self.kind][0](self.width, self.num_heads, self.config.mlp_width)
        return block.to(self.dtype)

    @cached_property
    def twin(self) -> nn.Module:
        """Diffusers' block; its weights are rows of ours."""
        if find_spec("diffusers") is None:
            raise Unavailable("diffusers is not installed")
        _, ours, name, theirs = _KINDS[self.kind]
        module = import_module("diffusers.models.transformers.transformer_hunyuan_video")
        with torch.device("meta"):
            twin: nn.Module = getattr(module, name)(
                self.num_heads,
                self.width // self.num_heads,
                mlp_ratio=self.config.mlp_width_ratio,
            )
        weights = dict(self.native.named_parameters())
        state = {
            part.removeprefix(theirs): rows
            for rule in self.rules
            for part, rows in rule.views(weights[rule.native.removeprefix(ours)].detach())
        }
        twin.load_state_dict(state, assign=True)
        return twin

    @cached_property
    def constants(self) -> tuple[Streams, Tensor, Tensor]:
        """Rotary tables; the number of valid tokens, for us; the mask of them, for diffusers."""
        grid, dims = self.clip.grid, self.config.rope_dim_list
        rotary = build_rotary_tables(grid, dims, self.config.rope_theta, self.device)
        kv_len = torch.tensor([self.valid], device=self.device)
        mask = torch.arange(self.clip.joint, device=self.device) < kv_len
        return rotary, kv_len, mask[None, None, None]

    def ours(self, *, compile_it: bool = False) -> Weighted:
        """Our block as an entrant."""
        prefix, names = _KINDS[self.kind][1], dict(self.native.named_parameters())
        weights = tuple(names[rule.native.removeprefix(prefix)] for rule in self.rules)
        call = self.run_double if self.kind == DOUBLE else self.run_single
        return Weighted(compiled(call)() if compile_it else call, weights, tuple)

    def theirs(self, *, compile_it: bool = False) -> Weighted:
        """Diffusers' block as an entrant; the gradients of its weights are joined as ours are."""
        prefix, names = _KINDS[self.kind][3], dict(self.twin.named_parameters())
        parts = [part.removeprefix(prefix) for rule in self.rules for part in rule.diffusers]
        weights = tuple(names[part] for part in parts)
        call = self.run_twin
        return Weighted(compiled(call)() if compile_it else call, weights, self.join)

    def run_double(self, img: Tensor, txt: Tensor, vec: Tensor) -> Streams:
        rotary, kv_len, _ = self.constants
        return self.native(img, txt, vec, rotary, kv_len)

    def run_single(self, img: Tensor, txt: Tensor, vec: Tensor) -> Streams:
        rotary, kv_len, _ = self.constants
        x = self.native(torch.cat((img, txt), dim=1), vec, rotary, kv_len)
        img, txt = x.split((img.shape[1], txt.shape[1]), dim=1)
        return img, txt

    def run_twin(self, img: Tensor, txt: Tensor, vec: Tensor) -> Streams:
        rotary, _, mask = self.constants
        return self.twin(img, txt, vec, mask, rotary)

    def join(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of diffusers' weights as those of ours."""
        each: Iterator[Tensor] = iter(gradients)
        return [torch.cat([next(each) for _ in rule.diffusers]) for rule in self.rules]

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = ((1, self.clip.video), (1, self.clip.text), (1,))
        drawn = (
            torch.randn(*size, self.width, generator=generator, device=generator.device)
            for size in sizes
        )
        return tuple(x.to(self.dtype).requires_grad_() for x in drawn)

    def meaningful(self, stream: Tensor) -> Tensor:
        """A stream with zeros in place of padding, which is at the end of the text."""
        if stream.shape[1] == self.clip.video:
            return stream
        padding = torch.arange(self.clip.text, device=stream.device) >= self.valid - self.clip.video
        return stream.masked_fill(padding[:, None], 0)


def _case(pair: _Pair, *, quick: bool) -> Case:
    named = by_name(pair.device)
    return Case(
        name=pair.clip.name,
        function=pair.kind,
        dtype=pair.dtype,
        shape={"B": 1, "V": pair.clip.video, "T": pair.clip.text, "E": pair.width},
        inputs=pair.inputs,
        call=lambda *tensors: pair.ours()(*tensors),
        work=work(pair),
        ours=(
            Entrant("hunyuan_fast", pair.ours),
            *([Entrant("hunyuan_fast by name", pair.ours, named)] if named else []),
            *_with_each_attention(pair),
            Entrant(
                "hunyuan_fast compiled",
                partial(_compiled, pair.ours, quick),
                named or nullcontext,
            ),
        ),
        peers=(
            Peer("diffusers", pair.theirs),
            Peer("diffusers compiled", partial(_compiled, pair.theirs, quick)),
        ),
        meaningful=pair.meaningful,
    )


def _with_each_attention(pair: _Pair) -> list[Entrant]:
    """On a GPU our block with every kernel of attention that may be there, by name.

    The other ops are those of "hunyuan_fast by name". Who cannot take part says so when called.
    """
    found = []
    for name in dispatch.choices(_ATTENTION) if pair.device.type == "cuda" else ():
        context = by_name(pair.device, **{_ATTENTION: name})
        assert context is not None
        found.append(Entrant(f"attention {name.removeprefix('library_impl.')}", pair.ours, context))
    return found


def work(pair: _Pair) -> dict[str, Work]:
    """The least work of a block with weights W, width E, networks of M features and n valid tokens.

    Linear layers: to queries, keys and values 3 E^2, from attention E^2, in the network 2 E M, for
    every token; both kinds of block have these. To the vectors of modulation, six for each of two
    streams, or three in all, E^2 each, once. Attention: two products of n^2 E. Twice that in FLOPs,
    a multiplication and an addition.
    Backward: two products for each linear one, five for the two of attention.
    Bytes: forward W, the streams in and out; backward W, its gradient, the streams, their gradients
    in and out.
    """
    e, m, n = pair.width, pair.config.mlp_width, pair.valid
    modulation = 12 * e * e if pair.kind == DOUBLE else 3 * e * e
    linear = 2 * (n * (4 * e * e + 2 * e * m) + modulation)
    product = 2 * n * n * e
    weights = sum(p.numel() for p in pair.empty().parameters()) * pair.dtype.itemsize
    streams = n * e * pair.dtype.itemsize
    return {
        FORWARD: Work(weights + 2 * streams, linear + 2 * product),
        TRAINING: Work(3 * weights + 5 * streams, 3 * linear + (2 + 5) * product),
    }


def _compiled(build: Callable[..., Weighted], quick: bool) -> Weighted:
    if quick:
        raise Unavailable("a quick run has no time to compile a block")
    return build(compile_it=True)
