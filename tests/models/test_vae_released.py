"""The released architecture, 246 million random weights, against diffusers, whole clips in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hunyuan_fast import ops
from hunyuan_fast.models.vae.config import VAEConfig
from tests.models.vae_exactness import Exactness, Pair, Size

# 1e-4 of pixels whose standard deviation is at least this.
SCALE = 0.4
# Float64 is slow where convolutions have it from nobody: the smallest sizes only.
WIDE = [Size(1, 5, 3, 2), Size(5, 3, 5)]
SIZES = [*WIDE, Size(9, 5, 3), Size(17, 5, 3), Size(29, 3, 1, 2)]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Both classes, for this file alone: their weights take a gigabyte."""
    yield Pair(torch.Generator().manual_seed(0))


def check(found: Exactness) -> None:
    assert found.scale > SCALE, "the test must see pixels and latents"
    assert found.apart <= 1e-4
    if found.ours is not None and found.theirs is not None:
        assert found.ours <= 2 * found.theirs


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encode_and_decode_equal_diffusers(pair: Pair, size: Size) -> None:
    assert pair.vae.config == VAEConfig()
    for measure in (pair.encode, pair.decode):
        check(measure(size, wide=size in WIDE))


def _zeros_before_the_clip(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    batch, channels, _, *area = x.shape
    past = x.new_zeros((batch, channels, weight.shape[2] - 1, *area))
    return ops.causal_conv3d(x, weight, bias, **options, past=past)


def _zeros_around_frames(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    residual: Tensor | None = None,
    **_: Any,
) -> Tensor:
    t, h, w = (n - 1 for n in weight.shape[2:])
    seen = F.pad(torch.cat([x[:, :, :1]] * t + [x], dim=2), [w // 2] * 2 + [h // 2] * 2)
    y = F.conv3d(seen, weight, bias, stride)
    return y if residual is None else y + residual


def _first_frame_twice(x: Tensor, *weights: Tensor, factor: tuple[int, int, int]) -> Tensor:
    if factor[0] == 1 or x.shape[2] == 1:
        return ops.upsample_causal_conv3d(x, *weights, factor=factor)
    longer = ops.upsample_causal_conv3d(x, *weights, factor=factor, past=x[:, :, :1])
    return longer[:, :, :-1]


def _norm_of_each_frame(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    frames = [ops.group_norm_silu(frame, *arguments, **options) for frame in x.split(1, dim=2)]
    return torch.cat(frames, dim=2)


def _later_frames_seen(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return ops.frame_causal_attention(q, k, v, tokens_per_frame=q.shape[1])


FAULTS = [
    ("causal_conv3d.causal_conv3d", _zeros_before_the_clip),
    ("causal_conv3d.causal_conv3d", _zeros_around_frames),
    ("resample.upsample_causal_conv3d", _first_frame_twice),
    ("group_norm.group_norm_silu", _norm_of_each_frame),
    ("frame_causal_attention.frame_causal_attention", _later_frames_seen),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f.__name__ for _, f in FAULTS])
def test_a_fault_would_show(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., Tensor]
) -> None:
    """A mistake in one kind of layer makes pixels that are far further apart than 1e-4."""
    monkeypatch.setattr("hunyuan_fast.modules.causal_conv3d.fuses_norm", lambda *_: False)
    monkeypatch.setattr(f"hunyuan_fast.modules.{name}", fault)
    assert pair.decode(Size(5, 3, 1)).apart > 1e-2
