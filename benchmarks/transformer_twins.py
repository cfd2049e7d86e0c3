"""Our transformer and that of diffusers, several of each, all on the weights of one.

Attention in eight bits, compiled blocks and recomputation are set on a module, so whoever differs
in one of them has a module of their own. The 26 GB of the 13B model are in memory once: they are
drawn where they are used, in the dtype they are used in, and nobody copies them.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit.case import Unavailable
from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.dit.checkpoint import config_to_diffusers, rules
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.weights.rule import Rule
from hunyuan_fast.modules.fp8 import quantize_linears


@dataclass(frozen=True)
class Source:
    """Which weights, and where. pretrained: a model by name, else weights are random."""

    config: TransformerConfig
    dtype: torch.dtype
    device: torch.device
    pretrained: str | None = None


_held: list["Twins"] = []  # one at most


def twins(source: Source) -> "Twins":
    """Both models of a source; those of the one before are let go, and their memory with them."""
    if not _held or _held[0].source != source:
        _held.clear()
        torch.compiler.reset()
        gc.collect()
        if source.device.type == "cuda":
            torch.cuda.empty_cache()
        _held.append(Twins(source))
    return _held[0]


@dataclass(frozen=True)
class Twins:
    """Modules that hold the same weights."""

    source: Source

    @cached_property
    def native(self) -> HunyuanVideoTransformer:
        """Ours, which the memory of the weights belongs to."""
        source = self.source
        if source.pretrained is None:
            return with_random_weights(self.empty().to_empty(device=source.device))
        where = {"device": source.device, "dtype": source.dtype}
        return HunyuanVideoTransformer.from_pretrained(source.pretrained, **where)

    def empty(self) -> HunyuanVideoTransformer:
        """Ours without memory for its weights."""
        with torch.device("meta"):
            model = HunyuanVideoTransformer(**asdict(self.source.config)).to(self.source.dtype)
        return model.eval()

    def ours(
        self,
        *,
        compiled: bool = False,
        checkpointing: bool = False,
        fp8_attention: bool = False,
        fp8_weights: bool = False,
    ) -> HunyuanVideoTransformer:
        """Another one of ours.

        compiled: the blocks, each kind of which is compiled once
        fp8_weights: those of the blocks lie in memory again, in eight bits
        """
        model = self.empty()
        model.load_state_dict(self.native.state_dict(), assign=True)
        model.enable_gradient_checkpointing(checkpointing)
        if fp8_attention:
            model.set_attention(precision="fp8")
        if fp8_weights:
            quantize_linears(model)
        if compiled:
            torch.compiler.reset()
            for block in (*model.double_blocks, *model.single_blocks):
                block.compile(fullgraph=True, dynamic=False)
        return model

    def theirs(self, *, compiled: bool = False, checkpointing: bool = False) -> Any:
        """The class of diffusers; its weights are rows of ours. Compiled as it offers to."""
        if find_spec("diffusers") is None:
            raise Unavailable("diffusers is not installed")
        settings = config_to_diffusers(self.source.config)
        name = settings.pop("_class_name")
        with torch.device("meta"):
            twin = getattr(import_module("diffusers"), name)(**settings)
        weights = dict(self.native.named_parameters())
        state = {
            part: rows
            for rule in self.rules
            for part, rows in rule.views(_swapped(rule, weights[rule.native].detach()))
        }
        twin.load_state_dict(state, assign=True)
        if checkpointing:
            twin.enable_gradient_checkpointing()
        if compiled:
            torch.compiler.reset()
            twin.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return twin.eval()

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """What every parameter is called in diffusers."""
        return rules(self.source.config)

    def weights_of_ours(self, model: HunyuanVideoTransformer) -> tuple[Tensor, ...]:
        """All parameters, in the order of the rules."""
        names = dict(model.named_parameters())
        return tuple(names[rule.native] for rule in self.rules)

    def weights_of_theirs(self, twin: Any) -> tuple[Tensor, ...]:
        """The same; several of theirs are one of ours."""
        names = dict(twin.named_parameters())
        return tuple(names[part] for rule in self.rules for part in rule.diffusers)

    def join(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of theirs as those of ours."""
        each: Iterator[Tensor] = iter(gradients)
        return [
            _swapped(rule, torch.cat([next(each) for _ in rule.diffusers])) for rule in self.rules
        ]


def with_random_weights(model: HunyuanVideoTransformer) -> HunyuanVideoTransformer:
    """The model with weights of which none is so small that a mistake would hide."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.7 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.normal_(center, spread, generator=generator)
    return model


def _swapped(rule: Rule, tensor: Tensor) -> Tensor:
    """The tensor itself, or its halves in the order of the other layout: one small copy."""
    return torch.cat(tensor.chunk(2)[::-1]) if rule.swap_halves else tensor
