"""Planted faults: each realistic mistake of a kernel must be seen by the rules that judge them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kit import faults
from tests.kit.emulation import FlashAttention
from tests.ops.sliding_tile_attention_cases import Call, Emulated, draw_call, judge, visible

SEEDS = range(2)
VIDEO = 5 * 4 * 7


def _by(change) -> Emulated:
    """The pattern of a call that somebody has misread."""
    return Emulated(see=lambda call: visible(change(call)))


def _windows(change):
    return lambda call: replace(call, windows=change(call.windows))


def _without_text(call: Call) -> Tensor:
    seen = visible(call)
    seen[:, :VIDEO, VIDEO:] = False
    return seen


def _narrow_text(call: Call) -> Tensor:
    """The text's queries see what the last tile sees."""
    seen = visible(call)
    seen[:, VIDEO:] = seen[:, VIDEO - 1 : VIDEO]
    return seen


def _not_clamped(call: Call) -> Tensor:
    """Windows that stop at the borders instead of moving inwards: smaller ones there."""
    seen = visible(call)
    tiles = [torch.arange(-(-n // t)) for n, t in zip(call.grid, call.tile, strict=True)]
    tokens = torch.cartesian_prod(*map(torch.arange, call.grid)) // torch.tensor(call.tile)
    for head, window in enumerate(call.windows):
        distance = (tokens[:, None] - tokens[None]).abs()
        odd = torch.minimum(window, torch.tensor([len(t) for t in tiles]))
        seen[head, :VIDEO, :VIDEO] &= (distance <= odd // 2).all(-1)
    return seen


def _last_tile_cut(call: Call) -> Tensor:
    """Keys of the smaller tile at the end of W are forgotten, save by itself and by text."""
    seen = visible(call)
    columns = torch.arange(VIDEO) % call.grid[2]
    whole = call.grid[2] // call.tile[2] * call.tile[2]
    seen[:, :VIDEO, :VIDEO] &= (columns < whole) | (columns[:, None] >= whole)
    return seen


def _of_kernel(name: str, of: str = "ATTENTION") -> Emulated:
    return Emulated(kernel=getattr(faults, of)[name])


FAULTS = {
    "one window for all heads": _by(_windows(lambda w: w[:1].expand(len(w), 3))),
    "windows of the next head": _by(_windows(lambda w: w.roll(1, 0))),
    "axes in another order": _by(_windows(lambda w: w.flip(1))),
    "a tile too many": _by(_windows(lambda w: w + torch.tensor([0, 0, 1]))),
    "a tile too few": _by(_windows(lambda w: (w - torch.tensor([0, 1, 0])).clamp(1))),
    "everything is seen": _by(_windows(lambda w: w + 99)),
    "tiles of another shape": _by(lambda call: replace(call, tile=(call.tile[0], 3, 2))),
    "height and width swapped": _by(lambda call: replace(call, grid=(5, 7, 4))),
    "windows stop at the borders": Emulated(see=_not_clamped),
    "the last tile is forgotten": Emulated(see=_last_tile_cut),
    "text is not seen": Emulated(see=_without_text),
    "text does not see everything": Emulated(see=_narrow_text),
    "padding takes part": Emulated(padding=False),
    "scale forgotten": Emulated(kernel=FlashAttention(query=lambda q, scale: (q, 1.0))),
    "rescale skipped once": _of_kernel("rescale skipped once"),
    "accumulator in bf16": _of_kernel("accumulator in bf16"),
    "probabilities in fp8": _of_kernel("probabilities in fp8"),
    "the last group gives keys nothing": Emulated(keep=lambda group, groups: group < groups - 1),
    "delta dropped": _of_kernel("delta dropped", "ATTENTION_BACKWARD"),
    "dq not scaled": _of_kernel("dq not scaled", "ATTENTION_BACKWARD"),
    "dk not scaled": _of_kernel("dk not scaled", "ATTENTION_BACKWARD"),
}


def drawn(seed: int) -> Call:
    return draw_call(
        torch.Generator().manual_seed(seed),
        grid=(5, 4, 7),
        tile=(2, 2, 3),
        windows=((1, 2, 1), (2, 1, 3)),
        text=11,
        lengths=(151, 143),
        head_dim=32,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault):
    for seed in SEEDS:
        call = drawn(seed)
        with pytest.raises(AssertionError, match=r"more than|break the bound"):
            judge(fault, FAULTS[fault](call), call)


def test_right_kernels_raise_no_alarm():
    for seed in SEEDS:
        call = drawn(seed)
        for block in (16, 32, 128):
            kernel = FlashAttention(block=block, exp=lambda x: torch.exp2(x * 1.4426950408889634))
            judge("a right kernel", Emulated(kernel=kernel)(call), call)
