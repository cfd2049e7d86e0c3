"""Calls of the three functions of fused_modulation, their truth, and when a result is right."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from hunyuan_fast import ops
from hunyuan_fast.dispatch import implementations, use
from tests.kit.inputs import draw
from tests.kit.numerics import assert_as_good_as, assert_equal, assert_rounded_once

ROOM = "fused_modulation"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATE, NORM, BOTH = "gate_residual", "layer_norm_modulate", "gate_residual_layer_norm_modulate"
FUNCTIONS = (GATE, NORM, BOTH)
# Where there is a GPU, Triton compiles its kernels and refuses tensors on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_ON_CPU = {"cuda_impl"} if INTERPRETED else {"cuda_impl", "triton_impl"}
ON_CPU = tuple(name for name in implementations(ROOM) if name not in NOT_ON_CPU)
QUICK = tuple(name for name in ON_CPU if name != "triton_impl")  # not interpreted

each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_quick_implementation = pytest.mark.parametrize("name", QUICK)
each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_gated_function = pytest.mark.parametrize("function", (GATE, BOTH))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Call:
    """A call of one function: tensors and gradients of its results, by name and in its order."""

    function: str
    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor]
    index: Tensor | None = None
    options: dict[str, float] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        return self.options.get("eps", 1e-6)

    def with_tensors(self, **changed: Tensor) -> "Call":
        return replace(self, tensors=self.tensors | changed)

    def map(self, change) -> "Call":
        """The same call with every tensor changed, those of numbers and the index."""
        tensors, gradients = (
            {name: change(t) for name, t in group.items()}
            for group in (self.tensors, self.gradients)
        )
        index = None if self.index is None else change(self.index)
        return replace(self, tensors=tensors, gradients=gradients, index=index)


def draw_call(
    function: str,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    family: str = "normal",
    *,
    num_vectors: int | None = None,
    y_dtype: torch.dtype | None = None,
    vector_dtype: torch.dtype | None = None,
) -> Call:
    """Random tensors of ``shape`` (B, L, E); with ``num_vectors`` M a random index of tokens."""
    batch, length, width = shape
    vector_shape = (batch, width) if num_vectors is None else (batch, num_vectors, width)
    tensors = {"x": draw(family, shape, generator, dtype)}
    if function != NORM:
        tensors["y"] = draw("normal", shape, generator, y_dtype or dtype)
    for name in {GATE: ("gate",), NORM: ("shift", "scale")}.get(
        function, ("gate", "shift", "scale")
    ):
        vector = 0.3 * torch.randn(vector_shape, generator=generator)
        tensors[name] = vector.to(vector_dtype or dtype)
    results = {GATE: ("residual",), NORM: ("modulated",)}.get(function, ("residual", "modulated"))
    gradients = {name: draw("normal", shape, generator, dtype) for name in results}
    index = None
    if num_vectors is not None:
        index = torch.randint(num_vectors, (batch, length), generator=generator)
    return Call(function, tensors, gradients, index)


def run(name: str, call: Call) -> dict[str, Tensor]:
    """Results and gradients of one implementation, through the public function."""
    with use(name, ROOM):
        return call_function(call)


def call_function(call: Call) -> dict[str, Tensor]:
    """Results, and gradients as ``dx`` and so on, of whatever answers the call."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    results = getattr(ops, call.function)(*leaves.values(), index=call.index, **call.options)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, [*leaves.values()], [*call.gradients.values()])
    named = {name: t.detach() for name, t in zip(call.gradients, results, strict=True)}
    return named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def plain(call: Call, dtype: torch.dtype, residual: Tensor | None = None) -> dict[str, Tensor]:
    """The same in plain torch computed in ``dtype``; float64 is the truth.

    residual: what the implementation returned. The norm is of that, rounded as it is.
    """
    t = {name: x.detach().cpu().to(dtype, copy=True) for name, x in call.tensors.items()}
    d = {name: x.cpu().to(dtype) for name, x in call.gradients.items()}
    index = None if call.index is None else call.index.cpu()
    found, total = {}, d.get("residual")
    base = t["x"]
    if "gate" in t:
        found["residual"] = base + _of_tokens(t["gate"], index) * t["y"]
        base = found["residual"] if residual is None else residual.cpu().to(dtype)
    if "scale" in t:
        leaves = [
            base.clone().requires_grad_(),
            *(t[n].requires_grad_() for n in ("shift", "scale")),
        ]
        normed = torch.nn.functional.layer_norm(leaves[0], base.shape[-1:], eps=call.eps)
        modulated = normed * (1 + _of_tokens(leaves[2], index)) + _of_tokens(leaves[1], index)
        found["modulated"] = modulated.detach()
        through, *found_vectors = torch.autograd.grad(modulated, leaves, d["modulated"])
        found |= zip(("dshift", "dscale"), found_vectors, strict=True)
        total = through if total is None else total + through
    found["dx"] = total
    if "gate" in t:
        gate = t["gate"].requires_grad_()
        found["dy"] = _of_tokens(gate.detach(), index) * total
        (found["dgate"],) = torch.autograd.grad(_of_tokens(gate, index) * t["y"], gate, total)
    return found


def _of_tokens(vectors: Tensor, index: Tensor | None) -> Tensor:
    """Not by indexing, whose gradient torch adds up in the dtype of the vectors."""
    if index is None:
        return vectors[:, None]
    chosen = (index[..., None] == torch.arange(vectors.shape[1])).unsqueeze(-1)
    return torch.where(chosen, vectors[:, None], 0).sum(2)


def assert_right(actual: dict[str, Tensor], call: Call) -> None:
    """Tier A for the results, plain torch's error twice over for the gradients."""
    actual = {name: t.cpu() for name, t in actual.items()}
    residual = actual.get("residual")
    exact, single, same = (
        plain(call, dtype, residual)
        for dtype in (torch.float64, torch.float32, call.tensors["x"].dtype)
    )
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        if name in call.gradients:
            assert_rounded_once(result, exact[name], single[name], name=name)
        else:
            # autograd too rounds a gradient to the dtype of its tensor
            assert_as_good_as(result, exact[name], same[name].to(result.dtype), name=name)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert_equal(result, expected[name], name=name)


def assert_same_bits_at(
    names: Iterable[str], actual: dict[str, Tensor], expected: dict[str, Tensor], where: object
) -> None:
    """Of the results in ``names`` the part ``where``."""
    for name in names:
        assert_equal(actual[name][where], expected[name][where], name=name)
