"""A transformer whose tokens lie on several processes against the same one on one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.dit.parallel import parallelize
from hunyuan_fast.models.dit.windows import AttentionWindows
from tests.kit.numerics import assert_as_good_as
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
# Three heads: two processes that exchange heads get two and one.
CHANGES: dict[str, Any] = {"hidden_size": 72, "heads_num": 3}
SAME_EVERYWHERE = ("velocity", "inference")


def parts(
    case: dict[str, Any], compute: torch.dtype = torch.float64, held: torch.dtype = torch.float64
) -> tuple[HunyuanVideoTransformer, dict[str, Tensor], Tensor]:
    """A model, its inputs, and what the velocity is multiplied with to make a loss.

    compute, held: what it computes with, and what its numbers were rounded to before
    """
    generator = torch.Generator().manual_seed(0)
    model = tiny_model(generator, **CHANGES).to(held).to(compute)
    inputs = tiny_inputs(generator, **case)
    for name in ("latents", "text_states", "pooled_text"):
        inputs[name] = inputs[name].to(held).to(compute)
    weights = torch.randn(inputs["latents"].shape, generator=generator).to(held).to(compute)
    return model, inputs, weights


def results(model: Any, inputs: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """The velocity, and the gradients of all parameters."""
    velocity = model(**inputs)
    (velocity * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found = {"velocity": velocity.detach(), "inference": model(**inputs)}
    return found | grads


def shared(
    layout: dict[str, Any],
    case: dict[str, Any],
    checkpointing: bool,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The same by the processes of a layout, gradients averaged."""
    mesh = build_mesh(Layout(**layout), "cpu")
    model, inputs, weights = parts(case, dtype, dtype)
    parallelize(model, mesh, Layout(**layout))
    model.enable_gradient_checkpointing(checkpointing)
    found = results(model, inputs, weights)
    group = group_of(mesh, "data")
    for name, x in found.items():
        if name not in SAME_EVERYWHERE:
            torch.distributed.all_reduce(x, group=group)
            x /= mesh["data"].size()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float) -> None:
    """Relative to the largest element, where that is above one."""
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        error = float((found[name].double() - x.double()).abs().max())
        assert error <= allowed * max(1.0, float(x.abs().max())), f"{name}: {error}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(ranks: RankPool, layout: str, case: str) -> None:
    wanted = results(*parts(CASES[case]))
    options, checkpointing = LAYOUTS[layout], case == "image"
    for found in ranks.run(options["cp"], shared, options, CASES[case], checkpointing):
        assert_same(found, wanted, 1e-10)


@pytest.mark.parametrize("layout", ("ring of 3", "usp of 2 x 2"))
def test_in_narrower_dtypes(ranks: RankPool, layout: str) -> None:
    """fp32 within 1e-5 of one process; bf16 no further from the truth than twice one process."""
    options, case = LAYOUTS[layout], CASES["batch of different texts"]
    single = results(*parts(case, torch.float32, torch.float32))
    for found in ranks.run(options["cp"], shared, options, case, False, torch.float32):
        assert_same(found, single, 1e-5)
    half = torch.bfloat16
    exact, plain = results(*parts(case, torch.float64, half)), results(*parts(case, half, half))
    first, *others = ranks.run(options["cp"], shared, options, case, False, half)
    for name in SAME_EVERYWHERE:
        assert_as_good_as(first[name], exact[name], plain[name], name=name)
        assert all(torch.equal(other[name], first[name]) for other in others)
    # gradients of few numbers, each a sum over tokens: their worst errors taken together
    ratios = [
        float((first[name] - exact[name]).abs().max() / (plain[name] - exact[name]).abs().max())
        for name in exact
    ]
    assert torch.tensor(ratios).median() <= 2


def refused() -> list[str]:
    """What a model whose tokens go round a ring says to what only whole sequences have."""
    layout = Layout(cp=2)
    mesh, messages = build_mesh(layout, "cpu"), []

    def said(function: Callable[..., None], *args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except ValueError as error:
            messages.append(str(error))

    model, *_ = parts(CASES["image"])
    model.set_attention(precision="fp8")
    said(parallelize, model, mesh, layout)
    model.set_attention(precision="same")
    parallelize(model, mesh, layout)
    assert copy.deepcopy(model).context is model.context
    said(model.set_attention, precision="fp8")
    tiles = ("T", (1, 2, 3), (1, 2, 3))
    blocks = dict.fromkeys(model.attention_blocks(), ((1, 1, 1),) * 3)
    windows = dict(zip(("model", "grid", "tile"), tiles, strict=True))
    said(model.set_attention, windows=AttentionWindows(**windows, blocks=blocks))
    model.set_attention(precision="same", windows="dense")
    said(parallelize, model, mesh, Layout(cp=8, ulysses=8))
    return messages


def test_refusals(ranks: RankPool) -> None:
    for first, second, third, last in ranks.run(2, refused):
        assert "attention precision must be 'same' where tokens go round a ring" in first
        assert "got 'fp8'; let all processes of cp exchange heads" in first
        assert second == first
        assert "attention must be 'dense', without windows" in third and "ulysses = cp" in third
        assert "ulysses must be at most the 3 heads" in last
