"""A contender's call bound to its inputs, for one pass."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from benchmarks.kit.case import BACKWARD, FORWARD, TRAINING, Call, Case, Weighted, outputs
from benchmarks.kit.clock import Clock
from benchmarks.kit.contenders import Contender

_MOST_SETS = 8


class Inputs:
    """Equal calls with inputs at different places, so that each finds its own out of the cache.

    One set suffices where the clock flushes the cache, and where the case wants a warm one. All
    contenders go through one cycle of the sets: between two calls on the same one, whoever makes
    them, lies twice the cache in traffic. With a cycle each, one could find in the cache what the
    one before it has read.
    """

    def __init__(self, case: Case, device: torch.device, clock: Clock, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        copies = 1
        # A backward alone needs the graph of the very inputs that its forward had.
        if case.cold and not clock.flushes and BACKWARD not in case.work:
            copies = 1 + math.ceil(2 * clock.cache_bytes / case.work[FORWARD].num_bytes)
        copies = min(max(copies, 1), _MOST_SETS)
        first = case.inputs(generator)
        self.sets = [first, *(_copy(first) for _ in range(copies - 1))]
        self.gradients: list[tuple[Tensor, ...]] = [()] * copies
        if TRAINING in case.work:
            self.gradients = self._draw_gradients(case, copies, generator)
        self.cycle = itertools.cycle(zip(self.sets, self.gradients, strict=True))

    def _draw_gradients(
        self, case: Case, copies: int, generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        with torch.no_grad():
            outs = outputs(case.call(*self.sets[0]))
        # Nobody has to agree on gradients of what is not meaningful, so none come in there.
        noise = (torch.randn(out.shape, generator=generator, device=out.device) for out in outs)
        douts = tuple(case.meaningful(x.to(outs[0].dtype)) for x in noise)
        return [douts, *(tuple(d.clone() for d in douts) for _ in range(copies - 1))]


class Bound:
    """``call`` on the next set of inputs; returns the output, or the gradients."""

    def __init__(self, call: Call, what: str, inputs: Inputs) -> None:
        self._call = call
        self._weights = call.weights if isinstance(call, Weighted) else ()
        passes = {FORWARD: self._forward, BACKWARD: self._backward, TRAINING: self._training}
        self._run = passes[what]
        self._outputs: tuple[Tensor, ...] | None = None
        self._sets = inputs.cycle

    def __call__(self) -> tuple[Tensor, ...]:
        return self._run(*next(self._sets))

    def _forward(
        self, tensors: tuple[Tensor, ...], douts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return outputs(self._call(*tensors))

    def _training(
        self, tensors: tuple[Tensor, ...], douts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        return torch.autograd.grad(outputs(self._call(*tensors)), [*leaves, *self._weights], douts)

    def _backward(
        self, tensors: tuple[Tensor, ...], douts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if self._outputs is None:  # in the first call, which is not timed
            self._outputs = outputs(self._call(*tensors))
        leaves = [*(tensor for tensor in tensors if tensor.requires_grad), *self._weights]
        return torch.autograd.grad(self._outputs, leaves, douts, retain_graph=True)

    def kept_bytes(self) -> int:
        """What a call keeps for backward: all but the weights, memory that is shared once."""
        known = {weight.untyped_storage().data_ptr() for weight in self._weights}
        kept: dict[int, int] = {}
        alive: list[object] = []  # so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        tensors, _ = next(self._sets)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive.append(self._call(*tensors))
        return sum(kept.values())


def alike(call: Call, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that ``call`` got, as every contender has them: of inputs, then of weights."""
    if not isinstance(call, Weighted):
        return list(gradients)
    inputs = len(gradients) - len(call.weights)
    return [*gradients[:inputs], *call.arrange(gradients[inputs:])]


def context_of(contender: Contender, what: str) -> Callable[[], AbstractContextManager[object]]:
    """What surrounds every timed stretch of a contender, outside of the clock."""

    @contextmanager
    def context() -> Iterator[None]:
        with torch.set_grad_enabled(what != FORWARD), contender.context():
            yield

    return context


def _copy(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
