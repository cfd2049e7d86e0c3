"""A test of the tests: wrong causal convolutions must be caught, right ones raise no alarm."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.causal_conv3d_cases import (
    Call,
    as_torch_would,
    assert_right,
    channels_last,
    clip,
    differentiate,
    draw_call,
)

SEEDS = range(4)


def _same(t, *_):
    return t


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A convolution with steps to replace; the defaults are right."""

    clip: Callable[[Call], Tensor] = clip
    space: str = "replicate"
    weight: Callable[[Tensor], Tensor] = _same
    write: Callable[[Tensor, Call], Tensor] = _same
    gradient: Callable[[str, Tensor], Tensor] = lambda _, t: t

    def forward(self, call: Call) -> Tensor:
        rows, columns = (n // 2 for n in call.weight.shape[3:])
        sides = (columns, columns, rows, rows, 0, 0)
        seen = self.clip(call).float()
        mode = {"mode": self.space} if self.space == "replicate" else {}
        wide = self.weight(call.weight).float()
        bias = None if call.bias is None else call.bias.float()
        y = F.conv3d(F.pad(seen, sides, **mode), wide, bias, call.stride)
        return self.write(y, call).to(call.x.dtype)

    def results(self, call: Call) -> list[Tensor | None]:
        laid_out = []
        labels = ("y", "x", "weight", "bias", "past")
        for label, t in zip(labels, differentiate(self.forward, call), strict=True):
            if t is not None:
                t = self.gradient(label, t.clone())
                if label in ("y", "x", "past"):
                    t = channels_last(t)
                else:
                    t = t.contiguous()
            laid_out.append(t)
        return laid_out


def _before_is_zero(call: Call) -> Tensor:
    whole = clip(call)
    if call.past is None:
        lead = call.weight.shape[2] - 1
        whole = torch.cat((torch.zeros_like(whole[:, :, :lead]), whole[:, :, lead:]), 2)
    return whole


def _past_is_first_frame(call: Call) -> Tensor:
    if call.past is None:
        return clip(call)
    return clip(replace(call, past=call.x[:, :, :1].expand_as(call.past)))


def _first_frame_doubled(call: Call) -> Tensor:
    if call.factor is None or call.factor[0] == 1 or call.past is not None:
        return clip(call)
    whole, lead = clip(call), call.weight.shape[2] - 1
    first = whole[:, :, :1]
    return torch.cat((*[first] * lead, first, whole[:, :, lead:-1]), 2)


def _phases_swapped(y: Tensor, call: Call) -> Tensor:
    if call.factor is None or call.factor[2] == 1:
        return y
    return torch.stack((y[..., 1::2], y[..., 0::2]), -1).flatten(-2)


def _taps_rounded(weight: Tensor) -> Tensor:
    """Sums of taps made in the dtype of the weight, one by one, and worse: to bf16 in fp32."""
    return weight.to(torch.float8_e4m3fn).to(weight.dtype)


def _lose(label: str, spoil: Callable[[Tensor], object]) -> Callable[[str, Tensor], Tensor]:
    def gradient(name: str, t: Tensor) -> Tensor:
        if name == label:
            spoil(t)
        return t

    return gradient


FAULTS = {
    "zeros in space": Kernel(space="constant"),
    "zeros before the clip": Kernel(clip=_before_is_zero),
    "past ignored": Kernel(clip=_past_is_first_frame),
    "first frame repeated in time": Kernel(clip=_first_frame_doubled),
    "taps reversed in time": Kernel(weight=lambda w: w.flip(2)),
    "taps reversed in a row": Kernel(weight=lambda w: w.flip(4)),
    "rows and columns exchanged": Kernel(weight=lambda w: w.transpose(3, 4)),
    "weight rounded to 8 bits": Kernel(weight=_taps_rounded),
    "phases exchanged": Kernel(write=_phases_swapped),
    "bias forgotten": Kernel(
        write=lambda y, call: y if call.bias is None else y - call.bias.view(1, -1, 1, 1, 1)
    ),
    "last column not written": Kernel(write=lambda y, _: y.index_fill(4, torch.tensor(-1), 0)),
    "gradient of the border not folded": Kernel(
        gradient=_lose("x", lambda t: t[:, :, :, 0].mul_(0.5))
    ),
    "gradient of the first frame not folded": Kernel(
        gradient=_lose("x", lambda t: t[:, :, 0].mul_(0.5))
    ),
    "one tap without a gradient": Kernel(
        gradient=_lose("weight", lambda t: t[:, :, 0, 1, 2].zero_())
    ),
    "gradient of the bias of one sample": Kernel(gradient=_lose("bias", lambda t: t.mul_(0.5))),
    "gradient of past forgotten": Kernel(gradient=_lose("past", lambda t: t.zero_())),
}
CALLS = (
    {"past": 2},
    {"stride": (2, 2, 2)},
    {"factor": (2, 2, 2)},
    {"factor": (1, 2, 2), "past": 1},
)


def alarms(kernel: Kernel, generator: torch.Generator, dtype: torch.dtype) -> int:
    count = 0
    for options in CALLS:
        call = draw_call(generator, shape=(2, 16, 3, 4, 5), channels=8, dtype=dtype, **options)
        try:
            assert_right(kernel.results(call), call)
        except AssertionError:
            count += 1
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, dtype, generator):
    assert alarms(FAULTS[fault], generator, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_raise_no_alarm(seed, dtype):
    assert not alarms(Kernel(), torch.Generator().manual_seed(seed), dtype)


def test_the_yardstick_is_right_itself(generator):
    call = draw_call(generator, shape=(1, 3, 2, 4, 5), dtype=torch.float64, factor=(2, 1, 2))
    torch.testing.assert_close(
        as_torch_would(call), Kernel().forward(call).double(), atol=1e-5, rtol=1e-5
    )
