"""Memory of a step of the 13B transformer, computed: ours and that of diffusers.

    python -m benchmarks.step_memory

Both models are run on the meta device, where tensors have shapes and no memory, and what is alive
at each moment is added up: every tensor that a module or an op of torch makes. Of what a kernel
needs within itself only queries, keys and values are counted, which one of our ops makes; those of
attention need little more forward, and sums in float32 backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import shapes
from benchmarks.bench_transformer import FEW_BLOCKS, REAL
from benchmarks.transformer_twins import Source, Twins
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.planning.hardware import find_gpu

META = torch.device("meta")
OURS, THEIRS = "hunyuan_fast", "diffusers"
_GPUS = ("h100", "h200")


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that are alive, at most, but for those that are known before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {_place(x) for x in known}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        self.largest: dict[torch.dtype, int] = {}  # elements of a tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                self._enter(each)
                before = self.largest.get(each.dtype, 0)
                self.largest[each.dtype] = max(before, each.numel())
        within = _heads_within(str(func), args)
        self.peak = max(self.peak, self.now + within)
        return results

    def _enter(self, tensor: Tensor) -> None:
        place, storage = _place(tensor), tensor.untyped_storage()
        if place in self.known or place in self.alive:
            return
        self.alive[place] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._leave, place)

    def _leave(self, place: int) -> None:
        self.now -= self.alive.pop(place)


@contextmanager
def no_scores() -> Iterator[None]:
    """In place of torch's attention one that makes no scores, as its kernels for a GPU do."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Any:
        return _Attention.apply(query, key, value)

    # Not by a mode, which recomputation in a backward pass would not see.
    real = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _heads_within(name: str, args: tuple[Any, ...]) -> int:
    """Bytes of q, k and v, which ``norm_rope_attention`` makes of packed projections."""
    if not name.startswith("hunyuan_fast.norm_rope_attention"):
        return 0
    qkv, text_qkv = args[0], args[6]
    rows = qkv.shape[1] + (0 if text_qkv is None else text_qkv.shape[1])
    return int(qkv.shape[0] * rows * qkv.shape[2] * qkv.itemsize)


@dataclass(frozen=True)
class Need:
    """Bytes of a step: weights, and the most beyond them."""

    weights: int
    peak: int

    @property
    def total(self) -> int:
        return self.weights + self.peak


def need(
    who: str,
    clip: shapes.Tokens,
    config: TransformerConfig = REAL,
    *,
    training: bool = False,
    checkpointing: bool = False,
) -> Need:
    """What a step of a clip takes in bf16, forward, or in training with gradients of all weights.

    The weights' own memory is counted once, and that of optimisers not at all.
    """
    pair = _Meta(Source(config, torch.bfloat16, META))
    build = pair.ours if who == OURS else pair.theirs
    model = build(checkpointing=checkpointing)
    inputs = _inputs(clip, config)
    known = [*model.parameters(), *inputs]
    with no_scores(), Ledger(known) as ledger, torch.set_grad_enabled(training):
        velocity = model(*inputs) if who == OURS else model(*inputs, return_dict=False)[0]
        if training:
            gradients = torch.autograd.grad(
                velocity, list(model.parameters()), torch.empty_like(velocity)
            )
            del gradients
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    return Need(weights, ledger.peak)


class _Meta(Twins):
    """Both models without memory for their weights."""

    @property
    def native(self) -> Any:  # type: ignore[override]
        return self.empty()


def _inputs(clip: shapes.Tokens, config: TransformerConfig) -> tuple[Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    size = (n * p for n, p in zip(clip.grid, config.patch_size, strict=True))
    return (
        empty(1, config.in_channels, *size),
        empty(1, dtype=torch.float32),
        empty(1, clip.text, config.text_states_dim),
        empty(1, clip.text, dtype=torch.bool),
        empty(1, config.text_states_dim_2),
        empty(1),
    )


def main() -> None:
    """Print what every step needs, and which cards have it."""
    console, table = Console(), Table(show_edge=False)
    for name in ("step", "", "weights GB", "beyond GB", "in all GB", *_GPUS):
        table.add_column(name, justify="left" if name in ("step", "") else "right")
    few = f"{FEW_BLOCKS.mm_double_blocks_depth} + {FEW_BLOCKS.mm_single_blocks_depth} blocks"
    steps: dict[str, Callable[[str, shapes.Tokens], Need]] = {
        "denoising": need,
        f"training, {few}": lambda who, clip: need(who, clip, FEW_BLOCKS, training=True),
        f"training, {few}, checkpointing": lambda who, clip: need(
            who, clip, FEW_BLOCKS, training=True, checkpointing=True
        ),
    }
    for clip in (shapes.CLIP_720P_129, shapes.CLIP_480P_65, shapes.CLIP_256P_65):
        for step, count in steps.items():
            for who in (OURS, THEIRS):
                found = count(who, clip)
                fits = (
                    "yes" if found.total < find_gpu(gpu).memory_gib * 2**30 else "no"
                    for gpu in _GPUS
                )
                sizes = (f"{x / 1e9:.1f}" for x in (found.weights, found.peak, found.total))
                table.add_row(f"{clip.name} {step}", who, *sizes, *fits)
    console.print(table)


if __name__ == "__main__":
    main()
