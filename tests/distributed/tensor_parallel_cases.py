"""What ranks of a tensor-parallel group compute, against the same model on one process."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_fast.distributed.collectives import all_reduce_sum
from hunyuan_fast.distributed.cuts import Cut
from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.distributed.traffic import count_traffic
from hunyuan_fast.models.dit import tensor_parallel
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.dit.parallel import parallelize
from hunyuan_fast.models.dit.tensor_parallel import parallelize_tensors
from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.modules import tensor_parallel as layers
from hunyuan_fast.modules.fp8 import quantize_linears
from hunyuan_fast.ops.collectives import gather
from tests.models.dit_cases import tiny_inputs, tiny_model

# 12 heads for every number of ranks; the channels of the network divide by none of them.
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "heads_num": 12,
    "rope_dim_list": (2, 2, 4),
    "mlp_width_ratio": 1.05,
    "mm_double_blocks_depth": 2,
    "mm_single_blocks_depth": 1,
}
# Of the 13, 12 and 11 video tokens, 2, 3 and 4 ranks leave none, one, and all but one; one token
# of text is not for every rank.
CASES: tuple[dict[str, Any], ...] = (
    {"size": (13, 2, 2), "text_lengths": (7, 3), "text_length": 7},
    {"size": (1, 2, 22), "text_lengths": (1,), "text_length": 1},
    {"size": (3, 4, 4), "text_lengths": (4, 0), "text_length": 4},
)
GRID = (13, 1, 1)

Gradients = dict[str, Tensor]


def transformer(**changes: Any) -> HunyuanVideoTransformer:
    """The same weights on every rank."""
    return tiny_model(torch.Generator().manual_seed(1), **{**SIZES, **changes})


def shared_transformer(
    sizes: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[HunyuanVideoTransformer, DeviceMesh]:
    """The part of this process of :func:`transformer`."""
    model, layout = transformer().to(dtype), Layout(**sizes)
    mesh = build_mesh(layout, "cpu")
    parallelize(model, mesh, layout)
    return model, mesh


def inputs_of(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs, rounded to the dtype where they are floating."""
    inputs = tiny_inputs(torch.Generator().manual_seed(2), **case)
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def step(
    model: HunyuanVideoTransformer,
    cases: tuple[dict[str, Any], ...],
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
) -> tuple[list[Tensor], Gradients]:
    """Velocities of all cases, and the gradients of one loss over them, inputs included.

    dtype: to which inputs are rounded; they are then given in ``compute``, or in it
    """
    model.zero_grad()
    velocities, gradients, loss = [], {}, torch.zeros(())
    leaves = {}
    for number, case in enumerate(cases):
        inputs = {
            n: x.to(compute or dtype) if x.is_floating_point() else x
            for n, x in inputs_of(case, dtype).items()
        }
        for name in ("latents", "text_states", "pooled_text"):
            leaves[f"{name} {number}"] = inputs[name].requires_grad_()
        velocity = model(**inputs)
        weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(3))
        loss = loss + (velocity * weights.to(velocity.dtype)).sum(dtype=torch.float64)
        velocities.append(velocity.detach())
    loss.backward()
    for name, leaf in (*model.named_parameters(), *leaves.items()):
        assert leaf.grad is not None, name
        gradients[name] = leaf.grad.clone()
    return velocities, gradients


def compare(
    sizes: dict[str, Any],
    dtype: torch.dtype,
    checkpointing: bool = False,
    fault: str | None = None,
    cases: tuple[dict[str, Any], ...] = CASES,
) -> dict[str, Any]:
    """The worst differences from one process, and the gradients of what every process has whole."""
    alone = transformer().to(dtype)
    expected, wanted = step(alone, cases, dtype)
    with FAULTS[fault]() if fault else nullcontext():
        model, mesh = shared_transformer(sizes, dtype)
        model.enable_gradient_checkpointing(checkpointing)
        velocities, gradients = step(model, cases, dtype)
        inference = [infer(model, case, dtype) for case in cases]
    data = group_of(mesh, "data")
    if data is not None:
        gradients = {n: all_reduce_sum(x, data) / data.size() for n, x in gradients.items()}
    outputs = zip((*velocities, *inference), (*expected, *expected), strict=True)
    cut = {n: model.cuts[n].take(x) if n in model.cuts else x for n, x in wanted.items()}
    scale = max(x.abs().max() for x in wanted.values())
    return {
        "output": max(float((a - b).abs().max()) for a, b in outputs),
        "gradient": {n: float((gradients[n] - cut[n]).abs().max() / scale) for n in wanted},
        "replicated": {n: x for n, x in gradients.items() if n not in model.cuts},
    }


@torch.no_grad()
def infer(model: HunyuanVideoTransformer, case: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The velocity as sampling computes it."""
    return model(**inputs_of(case, dtype))


def low_precision(sizes: dict[str, Any]) -> dict[str, Any]:
    """Velocities and gradients in bf16, and how parameters are cut."""
    model, _ = shared_transformer(sizes, torch.bfloat16)
    velocities, gradients = step(model, CASES, torch.bfloat16)
    return {"velocities": velocities, "gradients": gradients, "cuts": dict(model.cuts)}


def traffic(sizes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes and messages of a forward pass, and of one with its backward pass."""
    model, _ = shared_transformer(sizes)
    with count_traffic() as forward:
        infer(model, CASES[0], torch.float32)
    with count_traffic() as both:
        step(model, CASES[:1], torch.float32)
    return {
        name: (count.total, sum(count.messages.values()))
        for name, count in (("forward", forward), ("both", both))
    }


def kept_for_backward(sizes: dict[str, Any]) -> int:
    """Bytes that a forward pass keeps, besides parameters."""
    model, _ = shared_transformer(sizes)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t)  # so that no address is used twice
        return t

    case = {"size": (4, 8, 16), "text_lengths": (16,), "text_length": 16}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(model(**inputs_of(case, torch.float32)))
    return sum(kept.values())


def variants(ranks: int) -> dict[str, float]:
    """Differences from one process of models that were changed before or after being shared."""
    case, mesh = CASES[0], build_mesh(Layout(tp=ranks), "cpu")
    names, heads = transformer().attention_blocks(), SIZES["heads_num"]
    windows = AttentionWindows(
        model="tiny",
        grid=GRID,
        tile=(1, 1, 1),
        blocks={name: tuple((1 + 2 * (h % 3), 1, 1) for h in range(heads)) for name in names},
    )
    changes: dict[str, Callable[[HunyuanVideoTransformer], None]] = {
        "windows": lambda model: model.set_attention(windows=windows),
        "fp8 weights": quantize_linears,
    }
    plain, found = infer(transformer(), case, torch.float32), {}
    for name, change in changes.items():
        alone, model = transformer(), transformer()
        change(alone)
        change(model)
        parallelize_tensors(model, mesh)
        expected = infer(alone, case, torch.float32)
        assert (expected - plain).abs().max() > 1e-3, "the change must be seen"
        found[name] = float((infer(model, case, torch.float32) - expected).abs().max())
        if name == "windows":
            later = transformer()
            parallelize_tensors(later, mesh)
            change(later)
            found["later"] = float((infer(later, case, torch.float32) - expected).abs().max())
            copied = copy.deepcopy(later)
            found["copy"] = float((infer(copied, case, torch.float32) - expected).abs().max())
    return found


def lengths_of_another_pass() -> None:
    """With gradient checkpointing, each pass has to remember its own lengths."""
    model, _ = shared_transformer({"tp": 2})
    model.enable_gradient_checkpointing()
    forget = mock.patch.object(layers.DividedTokens, "bound", lambda tokens, block: block)
    # both ranks would hold other numbers of tokens, so both fail and neither waits
    with forget, pytest.raises(ValueError, match=r"must have \d rows along dim 1"):
        step(model, (CASES[1], {**CASES[2], "size": (1, 2, 4)}), torch.float32)


def refused(ranks: int) -> None:
    """What cannot be shared, or not again."""
    mesh = build_mesh(Layout(tp=ranks), "cpu")
    with pytest.raises(ValueError, match=r"tp must divide the 2 heads .* got 3; .*\[1, 2\]"):
        parallelize_tensors(tiny_model(torch.Generator()), mesh)
    model = transformer()
    parallelize_tensors(model, mesh)
    with pytest.raises(ValueError, match="must hold all of its weights, got one that was shared"):
        parallelize_tensors(model, mesh)


def unchanged() -> bool:
    """Whether a mesh without anybody else leaves a model as it is."""
    model = transformer()
    parallelize_tensors(model, build_mesh(Layout(dp=2), "cpu"))
    same = zip(model.state_dict().values(), transformer().state_dict().values(), strict=True)
    return not model.cuts and all(torch.equal(a, b) for a, b in same)


def _bias_by_every_rank() -> Any:
    def with_bias(layer: Any, summand: Tensor) -> Tensor:
        return layer.tokens.leave(summand + layer.bias)

    return mock.patch.object(layers, "_with_bias", with_bias)


def _own_gradients() -> Any:
    def enter(tokens: layers.DividedTokens, x: Tensor, stream: layers.Stream) -> Tensor:
        return gather(x, tokens._sizes(stream), tokens.group, gradient="own")

    return mock.patch.object(layers.DividedTokens, "enter", enter)


def _flat_cut() -> Any:
    by_parts = Cut.ranges

    def flat(cut: Cut, rank: int) -> Any:
        before, own = (
            [stop - start for other in some for start, stop in by_parts(cut, other)]
            for some in (range(rank), [rank])
        )
        ends = [sum(before) + end for end in accumulate(own, initial=0)]
        return tuple(pairwise(ends))

    return mock.patch.object(Cut, "ranges", flat)


FAULTS: dict[str, Callable[[], Any]] = {
    "the bias is added by every rank": _bias_by_every_rank,
    "gradients of norms are not summed": lambda: mock.patch.object(
        tensor_parallel, "shared", lambda weight, group: weight
    ),
    "gradients of modulations and biases are not summed": lambda: mock.patch.object(
        layers.DividedTokens, "for_all", lambda tokens, x: x
    ),
    "gradients of tokens are not summed": _own_gradients,
    "all parts are cut as one": _flat_cut,
}
