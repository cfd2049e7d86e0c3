"""What a convolution takes beside its input, its past and its result, by who answers the call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from hunyuan_fast.dispatch import implementations, select
from hunyuan_fast.models.vae.layers import Layer

# Below this the library's convolution stacks the taps on the CPU and runs in 2D.
_STACKED = 20480
# What the library keeps for itself.
KEPT = 64 << 20
# Outputs that the C++ kernel packs together, at most.
_BLOCK = 64


def answering(dtype: torch.dtype, device: torch.device) -> str:
    """The implementation that answers the convolutions of maps of this dtype on this device."""
    x = torch.empty((1, 1, 1, 1, 1), dtype=dtype, device=device)
    chosen = select("causal_conv3d", x, x, None, (1, 1, 1), None, None)
    return chosen.__name__.rpartition(".")[2]


@cache
def fuses_norm(answers: str) -> bool:
    """Whether that implementation applies a norm on its way, so that no normed map exists."""
    return bool(getattr(implementations("causal_conv3d").get(answers), "FUSES_NORM", False))


@dataclass(frozen=True)
class Call:
    """One call: `frames` of `rows` x `columns` of a map, `past` frames that stand before them.

    result: bytes of what comes out, of all clips; clips: how many are answered together.
    """

    layer: Layer
    item: int
    frames: int
    past: int
    rows: int
    columns: int
    result: int
    clips: int = 1

    @property
    def weights(self) -> int:
        """Bytes of the layer's kernel."""
        return self.layer.inputs * self.layer.outputs * self.layer.kernel**3 * self.item

    @property
    def padded(self) -> int:
        """Bytes of the past and the input with an edge all around, of all clips."""
        edge = 2 * (self.layer.kernel // 2)
        positions = (self.frames + self.past) * (self.rows + edge) * (self.columns + edge)
        return self.clips * self.layer.inputs * positions * self.item


def workspace(call: Call, answers: str) -> int:
    """Bytes that are in use at most beside input, past and result while the call is answered."""
    if answers == "cpu_impl":
        return _by_index(call)
    if answers in ("library_impl", "reference"):
        return KEPT + (_padded(call) if answers == "library_impl" else _repeated(call))
    # kernels on a GPU read by index as well; those of the phases lie side by side, padded
    return (9 if call.layer.upsamples else 3) * call.weights


def _by_index(call: Call) -> int:
    """Only kernels, each in its turn in the same memory: packed for the multiplication."""
    return call.weights * max(1, _BLOCK // call.layer.outputs)


def _padded(call: Call) -> int:
    """A copy with edges; of small maps the stack of taps; the result in another layout."""
    layer, item = call.layer, call.item
    if layer.kernel == 1:
        return call.result
    rows = layer.inputs * (call.frames + call.past) * (call.rows + 2)
    # the stack of taps, the library's copy of it and of the result
    stacked = 6 * call.padded + call.result if call.clips == 1 and rows <= _STACKED else 0
    if layer.upsamples:
        # the window of one parity, the sums of taps in fp32, the parities beside the result
        taps = 5 * max(call.weights, call.weights * 4 // item)
        return 2 * call.padded + stacked + call.result + taps
    return call.padded + stacked + 2 * call.weights


def _repeated(call: Call) -> int:
    """The repeated map with edges, made axis after axis, in fp32, and the result in fp32."""
    times = 1
    for factor in call.layer.factor:
        times *= factor
    wide = max(4, call.item)
    seen = call.padded * times
    return 2 * seen + (seen + call.result) * wide // call.item + 3 * call.weights
