"""The merge of what a hop of ring attention found into what the hops before it did."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.kit.case import FORWARD, TRAINING, Case, Peer, Work, compiled
from benchmarks.kit.discover import SCRATCH
from benchmarks.ring_timeline import LENGTH, draw, timelines
from hunyuan_fast.ops import merge_attention


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Tokens of one process out of several, at the model's heads."""
    fp32, bf16 = torch.float32, torch.bfloat16
    heads, dim = shapes.NUM_HEADS, shapes.HEAD_DIM
    if quick:
        length = 1024 if device.type == "cuda" else 64
        return [_case("quick", length, heads, dim, dtype) for dtype in (fp32, bf16)]
    if device.type == "cuda":
        clip = shapes.CLIP_720P_129
        return [_case(f"{clip.name} on 8", clip.joint // 8, heads, dim, bf16)]
    clip = shapes.CLIP_256P_33
    return [
        _case(f"{clip.name} on 2", clip.joint // 2, heads, dim, dtype) for dtype in (fp32, bf16)
    ]


def more(path: Path, *, quick: bool) -> list[Path]:
    """When a ring of processes computes, sends and waits: a plot beside the result, and traces."""
    found = timelines(SCRATCH, length=256 if quick else LENGTH)
    plot = path.with_name(f"{path.stem}-timeline.png")
    draw(found, plot)
    return [plot, *sorted(SCRATCH.glob("ring_attention-rank*.json"))]


def _case(name: str, length: int, heads: int, dim: int, dtype: torch.dtype) -> Case:
    elements, rows = length * heads * dim, length * heads
    numbers = 4 * rows
    part = elements * dtype.itemsize
    return Case(
        name=name,
        function="merge_attention",
        dtype=dtype,
        shape={"B": 1, "L": length, "N": heads, "D": dim},
        inputs=partial(_draw, (1, length, heads, dim), dtype),
        call=merge_attention,
        arguments=lambda *tensors: tensors,
        # out, part and the result; then dout, out and part, and the gradients of both
        work={
            FORWARD: Work(8 * elements + part + 3 * numbers),
            TRAINING: Work(20 * elements + 3 * part + 8 * numbers),
        },
        peers=(
            Peer("eager", lambda: _eager),
            Peer("torch.compile", compiled(_eager)),
        ),
    )


def _draw(
    shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    batch, length, heads, _ = shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=generator.device)

    out, part = draw(*shape), draw(*shape).to(dtype)
    lses = [draw(batch, heads, length) for _ in range(2)]
    return tuple(x.requires_grad_() for x in (out, lses[0], part, lses[1]))


def _eager(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As it is commonly written: the difference, weighed by a logistic function."""
    share = torch.sigmoid(part_lse - lse).transpose(1, 2)[..., None]
    return out - share * (out - part), lse - torch.nn.functional.logsigmoid(lse - part_lse)
