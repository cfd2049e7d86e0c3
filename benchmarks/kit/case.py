"""What a benchmark file describes: cases, the work in them, and who takes part."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.kit.pairing import Rounds

FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)
# Alone, after a forward that is not timed: of cases that have it in their work.
BACKWARD = "backward"
EVERY_PASS = (FORWARD, BACKWARD, TRAINING)

# An op returns a tensor, or a tuple of them.
Call = Callable[..., Tensor | tuple[Tensor, ...]]


class Unavailable(Exception):
    """A peer cannot take part on this machine; the message says why."""


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do: bytes read and written, matrix-product FLOPs."""

    num_bytes: int
    num_flops: int = 0


@dataclass(frozen=True)
class Entrant:
    """A way to the result of a case.

    build: returns a callable with the arguments of ``Case.call``; may raise ``Unavailable``
    context: entered around every timed stretch, outside of the clock
    same: the result is that of all others; else its difference is told, and judged by nobody
    """

    name: str
    build: Callable[[], Call]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    same: bool = True


class Peer(Entrant):
    """Somebody else's way."""


@dataclass(frozen=True)
class Weighted:
    """A call with weights of its own, which are differentiated together with the inputs.

    weights: what is trained, in an order of the entrant's own
    arrange: makes of their gradients those that all entrants have, the same tensors in one order;
        it serves the comparison and is not timed
    """

    call: Call
    weights: tuple[Tensor, ...]
    arrange: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(*tensors)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call returned, in a tuple also when it is one tensor."""
    return result if isinstance(result, tuple) else (result,)


def whole(x: Tensor) -> Tensor:
    """The tensor itself: all of it is meaningful."""
    return x


@dataclass(frozen=True, kw_only=True)
class Case:
    """One public function at one shape and dtype.

    name: the shape's name, from ``benchmarks.shapes``
    shape: its sizes by letter, for tables and results
    inputs: draws the tensors of one call on the generator's device; those that require a gradient
        are differentiated in the pass forward+backward
    call: the public function, taking those tensors
    arguments: the same call as ``dispatch.explain`` of ``op`` takes it
    ours: where no op is measured, and there are no ``arguments``: our ways to the result, of which
        one is always available; the first is what one gets without asking, unless a context asks
    work: the least work of each pass that is measured
    plain_flops: where the least work leaves something out that is written down: FLOPs with it
    meaningful: maps an output, or its gradient, to the part that everyone must agree on
    cold: inputs come from memory, not from a cache, as between two layers of a large model
    alternating: on a CPU, also measured in turn with an operation of torch
    rounds: how long to measure where a call takes so long that this is not for the run to say; on
        a CPU the first call is then the only one before, on a GPU kernels are still compiled in it
    once: a call takes so long that on a GPU, too, the first one is the only one before; and that
        whoever comes when the budget of ``rounds`` is all but spent is not called at all
    large: the peak of memory is that of the first call, on a CPU too, where it must be large enough
        to be seen; no call is made for it alone
    conv3d: channels, frames, rows and columns of a 3D convolution of 3 x 3 x 3 taps, which is timed
        beside the matrix product
    """

    name: str
    function: str
    dtype: torch.dtype
    shape: dict[str, int]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    call: Call
    work: dict[str, Work]
    peers: tuple[Peer, ...]
    arguments: Callable[..., tuple[object, ...]] | None = None
    ours: tuple[Entrant, ...] = ()
    meaningful: Callable[[Tensor], Tensor] = field(default=whole)
    cold: bool = True
    alternating: bool = False
    plain_flops: int | None = None
    rounds: Rounds | None = None
    once: bool = False
    large: bool = False
    conv3d: tuple[int, int, int, int] | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def compiled(call: Call) -> Callable[[], Call]:
    """The builder of a peer: ``call`` through ``torch.compile``, for the shapes it meets."""

    def build() -> Call:
        # Shapes of earlier cases count towards the limit on recompilations.
        torch.compiler.reset()
        return torch.compile(call, fullgraph=True, dynamic=False)

    return build
