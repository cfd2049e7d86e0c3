"""What ranks with parted states compute, keep and send, against one process that does it all."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.distributed.wholes import local_of
from hunyuan_fast.models.dit.fully_sharded import shard_states
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.trainer.optim import OptimConfig, build_optimizers, clip_gradients, states_here
from hunyuan_fast.trainer.team import Team
from tests.kit.sent import padded_part, watch_collectives
from tests.models.dit_cases import tiny_inputs, tiny_model

CPU = torch.device("cpu")
# More samples than ranks, and divided by neither 3 nor 4 of them; texts of every rank differ.
TEXTS = (7, 3, 0, 5, 6, 1, 2)
# The norm of the gradients is above this.
OPTIM = OptimConfig(lr=1e-4, max_grad_norm=0.05, weight_decay=0.1)
STEPS = 3
# 6 heads and 52 channels of the networks: for 2 and 3 processes, the channels unevenly for 3.
HEADS = {"heads_num": 6, "rope_dim_list": (2, 2, 4), "mlp_width_ratio": 1.1}


def transformer(**changes: Any) -> HunyuanVideoTransformer:
    """The same weights on every rank."""
    sizes = {"mm_double_blocks_depth": 1, "mm_single_blocks_depth": 1, "mlp_width_ratio": 2.0}
    return tiny_model(torch.Generator().manual_seed(0), **{**sizes, **changes})


def batch_of(step: int) -> dict[str, Tensor]:
    """The whole batch of a step."""
    return tiny_inputs(
        torch.Generator().manual_seed(step), size=(1, 4, 6), text_lengths=TEXTS, text_length=7
    )


def loss_of(model: nn.Module, step: int, team: Team | None = None) -> tuple[Tensor, Tensor]:
    """The share of a process in the loss of a step, and its velocities."""
    share = (team or Team()).share
    rows, weight = share.rows(len(TEXTS)), share.weight(len(TEXTS))
    inputs = {name: x[rows] for name, x in batch_of(step).items()}
    longest = int(inputs["text_mask"].sum(1).max())  # of these samples alone
    for name in ("text_states", "text_mask"):
        inputs[name] = inputs[name][:, : max(1, longest)]
    velocity = model(**inputs)
    shape = (len(TEXTS), *velocity.shape[1:])
    target = torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))[rows]
    return (velocity - target.to(velocity)).square().mean() * weight, velocity


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest number of all tensors."""
    scale = max(x.abs().max().item() for x in wanted.values())
    assert found.keys() == wanted.keys()
    return max((found[n] - wanted[n]).abs().max().item() for n in wanted) / scale


def train(
    model: nn.Module, team: Team, optim: OptimConfig, steps: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of all steps, and the whole gradients of the last one before they are clipped."""
    wholes = team.wholes(model)
    optimizers = build_optimizers(model, optim, team, wholes if team.mesh else None)
    norms, gradients = [], {}
    for step in range(steps):
        loss_of(model, step, team)[0].backward()
        if step == steps - 1:
            gradients = {n: wholes.gather(n, p.grad).clone() for n, p in model.named_parameters()}
        norms.append(clip_gradients(model, optim.max_grad_norm, team, wholes))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return norms, gradients


def compare(
    sizes: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    optim: OptimConfig = OPTIM,
    model: Callable[[], HunyuanVideoTransformer] = transformer,
) -> dict[str, float]:
    """The worst differences from one process: outputs, gradients and norms, and the weights."""
    alone, many = model().to(dtype), model().to(dtype)
    many.enable_gradient_checkpointing(checkpointing)
    norms, gradients = train(alone, Team(), optim)
    team = Team.of(Layout(**sizes), CPU)
    team.place(many)
    found_norms, found_gradients = train(many, team, optim)
    wholes = team.wholes(many)
    weights = {n: wholes.gather(n, p).detach() for n, p in many.named_parameters()}
    with torch.no_grad():
        expected, velocity = loss_of(alone, 9, team)[1], loss_of(many, 9, team)[1]
    assert min(norms) > optim.max_grad_norm, "nothing was clipped"
    return {
        "output": (velocity - expected).abs().max().item() / expected.abs().max().item(),
        "gradient": worst(found_gradients, gradients),
        "norm": max(abs(a / b - 1) for a, b in zip(found_norms, norms, strict=True)),
        "weights": worst(weights, {n: p.detach() for n, p in alone.named_parameters()}),
    }


def kept(sizes: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradients and moments that a rank keeps after a step."""
    team, model = Team.of(Layout(**sizes), CPU), transformer()
    team.place(model)
    (optimizer,) = build_optimizers(model, OPTIM, team)
    loss_of(model, 0, team)[0].backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = states_here(optimizer).state.values()
    return {
        "weights": sum(local_of(p).nbytes for p in parameters),
        "gradients": sum(local_of(p.grad).nbytes for p in parameters if p.grad is not None),
        "moments": sum(
            local_of(m[key]).nbytes for m in moments for key in ("exp_avg", "exp_avg_sq")
        ),
    }


def gathered(model: HunyuanVideoTransformer) -> list[bool]:
    """Which blocks have whole weights at the moment."""
    blocks = (*model.double_blocks, *model.single_blocks)
    return [not isinstance(next(block.parameters()), DTensor) for block in blocks]


def passes(sizes: dict[str, Any]) -> dict[str, Any]:
    """What is sent in a pass, by kind, and what should be; which blocks are whole on the way."""
    team, model = Team.of(Layout(**sizes), CPU), transformer()
    ranks = team.layout.dp
    blocks = [*model.double_blocks, *model.single_blocks]
    blocks += model.txt_in.individual_token_refiner.blocks
    block_part = sum(padded_part(p, ranks) for block in blocks for p in block.parameters())
    part = sum(padded_part(p, ranks) for p in model.parameters())
    team.place(model)
    loss_of(model, 0, team)[0].backward()  # what is done once is done
    with watch_collectives() as sent:
        loss = loss_of(model, 0, team)[0]
        whole = gathered(model)
        loss.backward()
    again = block_part if team.layout.zero == 3 else 0
    return {
        "sent": dict(sent.bytes),
        "wanted": {
            "all_gather": (ranks - 1) * (part + again),
            "reduce_scatter": (ranks - 1) * part,
        },
        "between": whole,
        "after": gathered(model),
    }


def averaged(sizes: dict[str, Any]) -> dict[str, int]:
    """Bytes of gradients that are averaged, and of weights that come from who updates them."""
    team, model = Team.of(Layout(**sizes), CPU), transformer()
    team.place(model)
    buckets: list[int] = []

    def note(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    model.register_comm_hook(team.group("data"), note)
    (optimizer,) = build_optimizers(model, OPTIM, team)
    loss_of(model, 0, team)[0].backward()
    with watch_collectives() as sent:
        optimizer.step()
    whole = sum(p.nbytes for p in model.parameters())
    return {"averaged": sum(buckets), "sent": sent.bytes["broadcast"], "whole": whole}


def infer(sizes: dict[str, Any]) -> dict[str, Any]:
    """Inference with weights in parts: whether it is exact, and what is whole when."""
    alone = transformer().requires_grad_(False)
    model = transformer().requires_grad_(False)
    team = Team.of(Layout(**sizes), CPU)
    team.place(model)
    whole, asked = [], []
    with torch.no_grad(), watch_collectives() as sent:

        def note(*_: Any) -> None:
            whole.append(gathered(model))
            asked.append(sent.messages["all_gather"])

        hooked = (*(block.img_mod for block in model.double_blocks),)
        for module in (*hooked, *(block.modulation for block in model.single_blocks)):
            module.register_forward_pre_hook(note)
        velocity = loss_of(model, 0, team)[1]
    return {
        "same": torch.equal(velocity, loss_of(alone, 0, team)[1]),
        "whole": whole,
        "asked": asked,
        "after": gathered(model),
    }


def warned(layout: dict[str, Any]) -> list[str]:
    """What is warned of in a step of this rank."""
    team, model = Team.of(Layout(**layout), CPU), transformer()
    assert team.mesh is not None
    shard_states(model, team.mesh, team.layout)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loss_of(model, 0, team)[0].backward()
    return [str(warning.message) for warning in found]


def in_bfloat16() -> dict[str, Any]:
    """Weights gathered in bfloat16: what a model in bfloat16 computes, and dtypes of gradients."""
    alone, model = transformer().bfloat16(), transformer()
    team = Team.of(Layout(dp=2, zero=3), CPU)
    assert team.mesh is not None
    shard_states(model, team.mesh, team.layout, param_dtype=torch.bfloat16)
    loss, velocity = loss_of(model, 0, team)
    loss.backward()
    return {
        "same": torch.equal(velocity, loss_of(alone, 0, team)[1]),
        "dtypes": {p.grad.dtype for p in model.parameters()},
    }


def compare_exactly(sizes: dict[str, Any]) -> dict[str, float]:
    """:func:`compare` in float64, with gradient checkpointing on many processes only."""
    return compare(sizes, dtype=torch.float64, checkpointing=True)


def compare_with_heads(sizes: dict[str, Any]) -> dict[str, float]:
    """:func:`compare` of a model whose heads and channels can be shared, in all its ways."""
    return compare(sizes, model=lambda: transformer(**HEADS))
