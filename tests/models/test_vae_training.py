"""Gradients of the whole VAE: as exact as those of diffusers, the same when blocks run twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.blocks import ResnetBlock
from hunyuan_fast.models.vae.tiling import Tiling
from hunyuan_fast.modules import causal_conv3d
from hunyuan_fast.modules.frame_causal_attention import FrameCausalAttention
from hunyuan_fast.ops import group_norm_silu_conv3d
from tests.models.vae_cases import TINY, clip, diffusers_twin, tiny_vae

Tensors = tuple[Tensor, ...]
DRAWS = 16
SHAPES = {"encode": (2, 3, 5, 24, 8), "decode": (2, 4, 2, 3, 1)}


def draw(function: str, generator: torch.Generator) -> tuple[Tensor, Tensors]:
    """What goes in, and the gradients of what comes out."""
    into, back = SHAPES[function], SHAPES["decode" if function == "encode" else "encode"]
    if function == "encode":
        x = clip(generator, *into)
        return x, (torch.randn(back, generator=generator), torch.randn(back, generator=generator))
    return torch.randn(into, generator=generator), (torch.randn(back, generator=generator),)


def gradients(model: Any, function: str, x: Tensor, dy: Tensors) -> dict[str, Tensor]:
    """Those of the input and of every parameter that took part, of our class or of diffusers'."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    found = getattr(model, function)(x)
    if function == "encode":
        posterior = found if isinstance(model, HunyuanVideoVAE) else found.latent_dist
        out: Tensors = (posterior.mean, posterior.logvar)
    else:
        out = (found if isinstance(found, Tensor) else found.sample,)
    torch.autograd.backward(out, [d.to(y.dtype) for y, d in zip(out, dy, strict=True)])
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"input": x.grad, **named}


@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_exact_as_those_of_diffusers(
    generator: torch.Generator, dtype: torch.dtype, function: str
) -> None:
    """Errors against diffusers in float64 are at most twice those of diffusers in the same dtype.

    A bias of eight values has an error that is one accident of rounding: many draws are taken, and
    the geometric mean of their ratios.
    """
    logs: dict[str, float] = {}
    for _ in range(DRAWS):
        vae = tiny_vae(generator).to(dtype)
        twin, exact = diffusers_twin(vae), diffusers_twin(vae).double()
        x, dy = draw(function, generator)
        x, dy = x.to(dtype), tuple(d.to(dtype) for d in dy)
        truth = gradients(exact, function, x.double(), tuple(d.double() for d in dy))
        ours, theirs = (gradients(model, function, x, dy) for model in (vae, twin))
        assert set(ours) == set(theirs) == set(truth)
        for name, expected in truth.items():
            errors = [float((g[name].double() - expected).norm()) for g in (ours, theirs)]
            if max(errors) > 0:
                ratio = (errors[0] + 1e-30) / (errors[1] + 1e-30)
                logs[name] = logs.get(name, 0.0) + math.log(ratio) / DRAWS
    worst = max(logs, key=logs.__getitem__)
    ratio = math.exp(logs[worst])
    assert ratio <= 2, f"the gradient of {worst} is off {ratio:.2f} times as far"
    print(f"{function} in {dtype}: {worst} {ratio:.2f}")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("function", SHAPES)
def test_gradient_checkpointing_changes_no_gradient(
    generator: torch.Generator, function: str, autocast: bool
) -> None:
    vae = tiny_vae(generator)
    x, dy = draw(function, generator)
    found = []
    for enabled in (False, True):
        vae.enable_gradient_checkpointing(enabled)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            found.append(gradients(vae, function, x, dy))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def count_calls(vae: HunyuanVideoVAE, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many normed convolutions, shortcuts and attentions run from now on."""
    calls: Counter[str] = Counter()
    for name, module in vae.named_modules():
        attends = isinstance(module, FrameCausalAttention)
        if attends or name.endswith("conv_shortcut"):
            kind = "attention" if attends else "conv_shortcut"
            module.register_forward_pre_hook(lambda *_, kind=kind: calls.update([kind]))

    def convolved(*args: Any, **kwargs: Any) -> Tensor:
        calls["normed"] += 1
        return group_norm_silu_conv3d(*args, **kwargs)

    monkeypatch.setattr(causal_conv3d, "group_norm_silu_conv3d", convolved)
    return calls


def test_checkpointing_runs_attentions_and_first_convolutions_twice(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vae(generator)
    calls = count_calls(vae, monkeypatch)
    blocks = 4 * TINY["layers_per_block"] + 4 * (TINY["layers_per_block"] + 1) + 2 * 2
    shortcuts = sum(b.conv_shortcut is not None for b in vae.modules() if type(b) is ResnetBlock)
    x, _ = draw("encode", generator)

    def forward() -> Tensor:
        return vae.decode(vae.encode(x).mode())

    once = {"normed": 2 * blocks + 2, "conv_shortcut": shortcuts, "attention": 2}
    forward().sum().backward()
    assert shortcuts and calls == once
    vae.enable_gradient_checkpointing()
    calls.clear()
    forward().sum().backward()
    assert calls == {**once, "normed": 3 * blocks + 2, "attention": 4}
    calls.clear()
    with torch.no_grad():
        forward()
    assert calls == {"conv_shortcut": shortcuts, "attention": 2}


def test_a_checkpointed_block_can_be_gone_through_twice(generator: torch.Generator) -> None:
    block = ResnetBlock(4, 8, num_groups=2)
    x = torch.randn(1, 4, 3, 5, 6, generator=generator).requires_grad_()
    y = block(x, again=True)
    wanted = torch.autograd.grad(block(x).sum(), (x, *block.parameters()))
    for _ in range(2):
        found = torch.autograd.grad(y.sum(), (x, *block.parameters()), retain_graph=True)
        assert all(map(torch.equal, found, wanted))


def test_checkpointed_tiles_give_the_same_gradients(generator: torch.Generator) -> None:
    vae = tiny_vae(generator)
    vae.enable_tiling(Tiling(size=16, size_stride=8, frames=4, frames_stride=4))
    x, dy = draw("decode", generator)
    expected = gradients(vae, "decode", x, dy)
    vae.enable_gradient_checkpointing()
    for name, gradient in gradients(vae, "decode", x, dy).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize("enabled", [False, True], ids=["kept", "checkpointed"])
def test_compiles_in_one_graph(generator: torch.Generator, enabled: bool, function: str) -> None:
    vae = tiny_vae(generator)
    vae.enable_gradient_checkpointing(enabled)
    x, (dy, *_) = draw(function, generator)

    def call(x: Tensor) -> Tensor:
        return vae.decode(x) if function == "decode" else vae.encode(x).mean

    def run(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        vae.zero_grad()
        y = call(x)
        y.backward(dy)
        return y.detach(), [p.grad for p in vae.parameters()]

    expected, wanted = run(call)
    actual, found = run(torch.compile(call, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for gradient, same in zip(found, wanted, strict=True):
        assert (gradient is None) == (same is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-4)
