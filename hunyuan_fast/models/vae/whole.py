"""The plain pass within a budget that allows it: every map whole, and the bits of no budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.models.vae.blocks import Run, plainly
from hunyuan_fast.models.vae.layers import flops_of, layers_of, sizes_of
from hunyuan_fast.models.vae.pages import own_pages
from hunyuan_fast.models.vae.plan import Plan, Progress


@torch.no_grad()
def whole(
    vae: nn.Module,
    plan: Plan,
    x: Tensor,
    call: Callable[[Tensor, Run], Tensor],
    progress: Progress | None = None,
) -> Tensor:
    """`call` of a batch (B, C, T, H, W), as many clips at a time as planned: moments, or pixels.

    call: the plain pass, told how to call residual blocks and the attention.
    """
    out: Tensor | None = None
    with own_pages():
        parts = x.split(plan.together)
        for index, part in enumerate(parts):
            run = plainly if progress is None else _reporting(vae, plan, progress, index)
            made = call(part, run)
            if len(parts) == 1:
                out = made
            else:
                if out is None:
                    like: dict[str, Any] = {"dtype": made.dtype, "device": made.device}
                    layout = torch.channels_last_3d
                    out = torch.empty(plan.result_shape, **like, memory_format=layout)
                out[index * plan.together : (index + 1) * plan.together] = made
            if progress is not None:
                progress((index + 1) / len(parts))
            del made
    assert out is not None
    return out


def _reporting(vae: nn.Module, plan: Plan, progress: Progress, part: int) -> Run:
    """Calls blocks as they are and tells the work that is done behind each of them."""
    layers = layers_of(plan.config, plan.half)
    done = list(accumulate(flops_of(layers, sizes_of(layers, plan.size))))
    parts = -(-plan.shape[0] // plan.together)
    shares: dict[nn.Module, float] = {}
    for layer, flops in zip(layers, done, strict=True):
        if layer.attends or layer.closes:
            # "<block>.conv2.conv" closes a residual block
            name = layer.conv if layer.attends else layer.conv.rsplit(".", 2)[0]
            shares[vae.get_submodule(name)] = (part + flops / done[-1]) / parts

    def run(block: nn.Module, x: Tensor) -> Tensor:
        y = plainly(block, x)
        progress(shares[block])
        return y

    return run
