"""A transformer whose tokens lie on several processes against the same one on one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.models.dit.parallel import parallelize
from tests.kit.ranks import RankPool
from tests.models.dit_cases import tiny_inputs, tiny_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "ring of 2": {"cp": 2},
    "ring of 3": {"cp": 3},
    "ring of 4": {"cp": 4},
    "ulysses of 2": {"cp": 2, "ulysses": 2},
    "usp of 2 x 2": {"cp": 4, "ulysses": 2},
}
CASES: dict[str, dict[str, Any]] = {
    "batch of different texts": {"size": (3, 6, 10), "text_lengths": (7, 0)},
    "image": {"size": (1, 4, 6), "text_lengths": (3,)},
    "fewer tokens than ranks": {"size": (1, 2, 4), "text_lengths": (1, 2), "text_length": 2},
}
DTYPE = torch.float64


def parts(case: dict[str, Any], **changes: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, its inputs, and what the velocity is multiplied with to make a loss."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model(generator, **changes).to(DTYPE)
    inputs = tiny_inputs(generator, **case)
    weights = torch.randn(inputs["latents"].shape, generator=generator).to(DTYPE)
    return model, inputs, weights


def results(model: Any, inputs: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """The velocity, and the gradients of all parameters."""
    velocity = model(**inputs)
    (velocity * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found = {"velocity": velocity.detach(), "inference": model(**inputs)}
    return found | grads


def shared(layout: dict[str, Any], case: dict[str, Any], checkpointing: bool) -> dict[str, Tensor]:
    """The same by the processes of a layout, gradients averaged."""
    mesh = build_mesh(Layout(**layout), "cpu")
    model, inputs, weights = parts(case)
    parallelize(model, mesh, Layout(**layout))
    model.enable_gradient_checkpointing(checkpointing)
    found = results(model, inputs, weights)
    group = group_of(mesh, "data")
    for name, x in found.items():
        if name not in ("velocity", "inference"):
            torch.distributed.all_reduce(x, group=group)
            x /= mesh["data"].size()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        error = float((found[name] - x).abs().max())
        assert error <= 1e-10 * max(1.0, float(x.abs().max())), f"{name}: {error}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(ranks: RankPool, layout: str, case: str) -> None:
    wanted = results(*parts(CASES[case]))
    options, checkpointing = LAYOUTS[layout], case == "image"
    for found in ranks.run(options["cp"], shared, options, CASES[case], checkpointing):
        assert_same(found, wanted)
