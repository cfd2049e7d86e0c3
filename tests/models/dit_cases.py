"""Tiny transformers, their inputs, and their counterparts in diffusers."""

from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.models.dit.checkpoint import config_to_diffusers, rules
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.weights.rule import Rule

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "heads_num": 2,
    "rope_dim_list": (4, 8, 12),
    "mm_double_blocks_depth": 2,
    "mm_single_blocks_depth": 3,
    "in_channels": 4,
    "out_channels": 4,
    "text_states_dim": 20,
    "text_states_dim_2": 12,
}


def tiny_model(generator: torch.Generator, **changes: Any) -> HunyuanVideoTransformer:
    """A small model in which every parameter is random and matters, norms included."""
    model = HunyuanVideoTransformer(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.7 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_inputs(
    generator: torch.Generator,
    *,
    size: tuple[int, int, int] = (3, 4, 6),
    text_lengths: tuple[int, ...] = (7, 3),
    text_length: int = 7,
) -> dict[str, Tensor]:
    """Inputs of ``TINY``, one sample for each of the ``text_lengths``."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch = len(text_lengths)
    mask = torch.arange(text_length) < torch.tensor(text_lengths)[:, None]
    return {
        "latents": draw(batch, TINY["in_channels"], *size),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "text_states": draw(batch, text_length, TINY["text_states_dim"]),
        "text_mask": mask,
        "pooled_text": draw(batch, TINY["text_states_dim_2"]),
        "guidance": 1000 * (1 + 7 * torch.rand(batch, generator=generator)),
    }


def to_diffusers(rule: Rule, native: Tensor) -> dict[str, Tensor]:
    """The diffusers tensors of one native tensor, by the letter of its rule."""
    if rule.swap_halves:
        native = torch.cat(native.chunk(2)[::-1])
    return dict(zip(rule.diffusers, native.split(list(rule.rows)), strict=True))


def to_native(rule: Rule, tensors: dict[str, Tensor]) -> Tensor:
    """The native tensor that the diffusers tensors of a rule make up."""
    native = torch.cat([tensors[name] for name in rule.diffusers])
    return torch.cat(native.chunk(2)[::-1]) if rule.swap_halves else native


def diffusers_state(model: HunyuanVideoTransformer) -> dict[str, Tensor]:
    """The state dict of a model in diffusers' names."""
    native = model.state_dict()
    state: dict[str, Tensor] = {}
    for rule in rules(model.config):
        state |= to_diffusers(rule, native[rule.native])
    return state


def diffusers_settings(model: HunyuanVideoTransformer) -> dict[str, Any]:
    """The constructor keywords of the counterpart of a model."""
    settings = config_to_diffusers(model.config)
    del settings["_class_name"]
    return settings


def diffusers_twin(model: HunyuanVideoTransformer) -> nn.Module:
    """diffusers' own class with the weights of a model."""
    from diffusers import HunyuanVideoTransformer3DModel

    twin = HunyuanVideoTransformer3DModel(**diffusers_settings(model))
    twin.load_state_dict(diffusers_state(model), strict=True)
    return twin.to(next(model.parameters()).dtype)


def run_twin(twin: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The velocity by diffusers' class, whose padded text must be finite."""
    return twin(
        inputs["latents"],
        inputs["timestep"],
        inputs["text_states"],
        inputs["text_mask"],
        inputs["pooled_text"],
        inputs["guidance"],
        return_dict=False,
    )[0]
