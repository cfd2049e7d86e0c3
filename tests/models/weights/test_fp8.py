"""Eight-bit weights: the official pair, the layer that keeps them, and quantization itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.weights.loader import without_memory
from hunyuan_fast.modules.fp8 import (
    FP8,
    Fp8Linear,
    dequantize_fp8,
    quantize_fp8,
    quantize_linears,
    replace_linears,
)
from tests.models.dit_cases import TINY, tiny_inputs
from tests.models.weights.cases import (
    RELEASED_HEAD,
    assert_same_weights,
    random_transformer,
    write_official_fp8,
)

load = HunyuanVideoTransformer.from_pretrained


def memory(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def in_blocks(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Fp8Linear)) and name.split(".")[0].endswith("_blocks")
    ]


def test_the_released_layers_are_the_ones_quantized() -> None:
    """200 linear layers of 20 double blocks and 120 of 40 single blocks, 12.457e9 weights."""
    with without_memory():
        model = HunyuanVideoTransformer()
        quantize_linears(model)
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 320
    assert round(sum(layer.weight.numel() for layer in layers) / 1e9, 3) == 12.457


def test_official_pair(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator, **RELEASED_HEAD)
    weights, _ = write_official_fp8(model, tmp_path)
    kept, expanded = load(weights), load(tmp_path, keep_fp8=False)
    names = in_blocks(model)
    assert len(names) == 13
    stored = torch.load(weights, weights_only=True)["module"]
    for name in names:
        layer = kept.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        assert layer.weight.dtype == FP8
        assert torch.equal(
            layer.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8)
        )
        product = stored[f"{name}.weight"].to(torch.bfloat16) * layer.weight_scale
        plain = expanded.get_parameter(f"{name}.weight")
        assert plain.dtype == torch.bfloat16
        assert torch.equal(plain, product)
        exact = model.get_parameter(f"{name}.weight")
        assert (plain.float() - exact).abs().max() < 0.04 * exact.abs().max()
    saved = memory(expanded) - memory(kept)
    assert saved == sum(model.get_submodule(name).weight.numel() - 2 for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_and_expanded_compute_the_same_bits(
    tmp_path: Path, generator: torch.Generator, dtype: torch.dtype
) -> None:
    changes = {**RELEASED_HEAD, "mm_double_blocks_depth": 0, "mm_single_blocks_depth": 2}
    model = random_transformer(generator, **changes)
    weights, _ = write_official_fp8(model, tmp_path)
    kept, expanded = load(weights, dtype=dtype), load(weights, dtype=dtype, keep_fp8=False)
    assert all(p.dtype == dtype for p in expanded.parameters())
    inputs = {
        name: value.to(dtype) if name in ("latents", "text_states", "pooled_text") else value
        for name, value in tiny_inputs(generator).items()
    }
    with torch.no_grad():
        assert torch.equal(kept(**inputs), expanded(**inputs))


def test_fp8_models_are_saved_and_read_again(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_transformer(generator).bfloat16()
    quantize_linears(model)
    model.save_pretrained(tmp_path / "native", max_shard_bytes=50_000)
    again = load(tmp_path / "native")
    assert_same_weights(model, again)

    model.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    plain = load(tmp_path / "diffusers")
    for name in in_blocks(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        assert torch.equal(plain.get_parameter(f"{name}.weight"), layer.expanded())
    assert_same_weights(plain, load(tmp_path / "native", keep_fp8=False))


def test_casting_a_model_leaves_its_fp8_weights(generator: torch.Generator) -> None:
    model = random_transformer(generator)
    quantize_linears(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if v.dtype == FP8}
    model.to(torch.float16).double()
    assert len(before) == len(in_blocks(model)) > 0
    for name, value in before.items():
        again = model.state_dict()[name]
        assert again.dtype == FP8
        assert torch.equal(again.view(torch.uint8), value.view(torch.uint8))
        assert model.state_dict()[f"{name}_scale"].dtype == torch.bfloat16
    assert model.img_in.proj.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_a_linear_with_the_expanded_weight(
    generator: torch.Generator, bias: bool, dtype: torch.dtype
) -> None:
    linear = nn.Linear(24, 40, bias=bias)
    layer = Fp8Linear.from_linear(linear)
    x = torch.randn(3, 5, 24, generator=generator).to(dtype).requires_grad_()
    expected = F.linear(x, layer.expanded().to(dtype), linear.bias.to(dtype) if bias else None)
    out = layer(x)
    assert torch.equal(out, expected)
    assert out.dtype == dtype
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, layer.expanded().to(dtype).sum(0).expand_as(x))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_quantization_error_is_that_of_three_mantissa_bits(generator: torch.Generator) -> None:
    for size in (1e-6, 0.02, 30.0):
        weight = torch.randn(200, 100, generator=generator) * size
        weight8, scale = quantize_fp8(weight)
        assert scale.dtype == torch.bfloat16
        assert float(scale) == pytest.approx(float(weight.abs().max()) / 448, rel=2**-8)
        exact = weight8.float() * scale.float()
        # Half a unit of the last of three mantissa bits, and the clamp of a scale rounded down.
        normal = weight.abs() > 2**-6 * float(scale)
        error = (exact - weight).abs()[normal] / weight.abs()[normal]
        assert error.max() <= 2**-4 + 1e-6
        assert (exact - weight).abs()[~normal].max() <= 2**-10 * float(scale) * 1.001


def test_quantization_of_zeros_and_of_nothing_finite() -> None:
    weight8, scale = quantize_fp8(torch.zeros(3, 4))
    assert torch.equal(dequantize_fp8(weight8, scale), torch.zeros(3, 4, dtype=torch.bfloat16))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quantize_fp8(torch.tensor([1.0, bad]))


def test_only_linear_layers_are_replaced() -> None:
    model = HunyuanVideoTransformer(**TINY)
    for name in ("img_in.proj", "double_blocks.0.nothing", "double_blocks"):
        with pytest.raises(ValueError, match=f"{name} is not a linear layer"):
            replace_linears(model, [name])
