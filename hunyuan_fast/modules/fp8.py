"""Linear layers whose weights lie in memory as eight-bit floats.

Only the weight is small: each call expands it as the released fp8 checkpoint prescribes,
W = bf16(W8) * bf16(scale), and multiplies in the dtype of the input. This halves the memory of a
bf16 layer and costs one pass over the weight per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCKS = ("double_blocks", "single_blocks")


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 weight and its bfloat16 scale (), with scale = max|weight| / 448.

    weight: any shape and float dtype; it is about weight8 * scale.
    Raises ValueError for a weight that is not finite.
    """
    largest = weight.detach().abs().max().float()
    if not bool(largest.isfinite()):
        raise ValueError("weight must be finite to be quantized, got NaN or infinity")
    # The scale is used in bfloat16, so it is rounded before the division and not after it.
    scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest)).bfloat16()
    scaled = weight.detach().float() / scale.float()
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """The bfloat16 weight bf16(weight8) * bf16(scale)."""
    return weight.to(torch.bfloat16) * scale.to(torch.bfloat16)


class Fp8Linear(nn.Module):
    """A linear layer with an e4m3 weight and one bfloat16 scale; for inference only.

    x: (..., in_features)    returns: (..., out_features) in the dtype of x
    """

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.zeros(out_features, in_features, dtype=FP8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones((), dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Fp8Linear:
        """The quantized form of `linear`, on its device."""
        with torch.device(linear.weight.device):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        if not linear.weight.is_meta:
            weight, layer.weight_scale = quantize_fp8(linear.weight)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer

    def expanded(self) -> Tensor:
        """The bfloat16 weight (out_features, in_features)."""
        return dequantize_fp8(self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.expanded().to(x.dtype), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Move with the model, but stay fp8 when the model is cast to another dtype."""
        weight, scale = self.weight.detach(), self.weight_scale
        super()._apply(fn, recurse)
        if self.weight.dtype != FP8:
            self.weight = nn.Parameter(weight.to(self.weight.device), requires_grad=False)
        if self.weight_scale.dtype != torch.bfloat16:
            self.weight_scale = scale.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def replace_linears(model: nn.Module, names: Sequence[str]) -> None:
    """Put the quantized form in place of the linear layers called `names`.

    Raises ValueError for a name that is not a linear layer of the model.
    """
    for name in names:
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is not a linear layer of {type(model).__name__}")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Fp8Linear.from_linear(linear))


def quantize_linears(model: nn.Module, *, containing: Sequence[str] = BLOCKS) -> None:
    """Quantize, in place, every linear layer with one of `containing` in its name.

    The default takes the layers of the double and single blocks, as the released fp8 checkpoint.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replace_linears(model, [name for name in names if any(part in name for part in containing)])
