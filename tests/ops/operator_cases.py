"""One call of every kind of every op, its gradients, and when two answers are the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hunyuan_fast import ops
from tests.kit.numerics import assert_equal

Results = tuple[Tensor, ...]
BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 5, 16, 2, 8
INDEX = torch.tensor([[0, 1, 1, 0, 2], [2, 2, 0, 1, 1]])
ROWS, VECTOR, VECTORS = (BATCH, LENGTH, WIDTH), (BATCH, WIDTH), (BATCH, 3, WIDTH)
PACKED, WEIGHT = (BATCH, LENGTH, 3 * HEADS * HEAD_DIM), (HEAD_DIM,)
MAPS, CHANNELS, GROUPS = (BATCH, 6, 3, 2, 4), (6,), 3
HEADED = (BATCH, LENGTH, HEADS, HEAD_DIM)
NUMBERS = (BATCH, HEADS, LENGTH)
MAP, FRAME, TAPS = (BATCH, 3, 2, 3, 4), (BATCH, 3, 1, 3, 4), (2, 3, 3, 3, 3)
ANGLES = torch.arange(LENGTH * HEAD_DIM / 2).view(LENGTH, -1).repeat_interleave(2, -1)


def _heads(qkv, q_weight, k_weight, *text):
    named = dict(zip(("text_qkv", "text_q_weight", "text_k_weight"), text, strict=False))
    tables = ANGLES.cos().to(qkv.device), ANGLES.sin().to(qkv.device)
    return ops.qk_norm_rope(qkv, q_weight, k_weight, *tables, num_heads=HEADS, **named)


def _group_norm(x, weight, bias):
    return ops.group_norm_silu(x, GROUPS, weight, bias)


def _normed(x, norm_weight, norm_bias, weight, bias):
    return ops.group_norm_silu_conv3d(x, 3, norm_weight, norm_bias, weight, bias)


def _prefixes(q, k, v):
    kv_len = torch.tensor([3, 5]).to(q.device)
    return ops.attention(q, k, v, kv_len=kv_len, return_lse=True)


def _own(q, k, v):
    q_len, kv_len = (torch.tensor(n).to(q.device) for n in ([2, 3], [5, 4]))
    return ops.attention(q, k, v, q_len=q_len, kv_len=kv_len, return_lse=True)


def _frames(q, k, v):
    return ops.frame_causal_attention(q, k, v, tokens_per_frame=1)


def _tiles(q, k, v):
    options = {"grid": (1, 2, 2), "tile": (1, 1, 1), "windows": [(1, 1, 1), (1, 2, 1)]}
    return ops.sliding_tile_attention(q, k, v, **options, return_lse=True)


def _indexed(x, y, gate, shift, scale):
    index = INDEX.to(x.device)
    return ops.gate_residual_layer_norm_modulate(x, y, gate, shift, scale, index=index)


def _continued(x, weight, bias, past):
    return ops.causal_conv3d(x, weight, bias, stride=(1, 2, 2), past=past)


def _doubled(x, weight, bias, past):
    return ops.upsample_causal_conv3d(x, weight, bias, factor=(2, 2, 2), past=past)


# the operator is the first word of a name; what refuses its second derivative is the last column
CASES: dict[str, tuple[Callable[..., Tensor | Results], tuple[tuple[int, ...], ...], str]] = {
    "fused_modulation gate": (ops.gate_residual, (ROWS, ROWS, VECTOR), "gate_residual"),
    "fused_modulation norm": (
        *(ops.layer_norm_modulate, (ROWS, VECTOR, VECTOR)),
        "layer_norm_modulate",
    ),
    "fused_modulation indexed": (
        *(_indexed, (ROWS, ROWS, VECTORS, VECTORS, VECTORS)),
        "gate_residual_layer_norm_modulate",
    ),
    "gelu_tanh": (ops.gelu_tanh, (ROWS,), "gelu_tanh"),
    "concat_gelu_tanh": (ops.concat_gelu_tanh, (VECTORS, ROWS[:1] + (3,) + ROWS[2:]), "gelu_tanh"),
    "group_norm_silu": (_group_norm, (MAPS, CHANNELS, CHANNELS), "group_norm_silu"),
    "group_norm_silu_conv3d": (
        *(_normed, (MAP, TAPS[1:2], TAPS[1:2], TAPS, TAPS[:1])),
        "group_norm_silu",
    ),
    "qk_norm_rope one stream": (_heads, (PACKED, WEIGHT, WEIGHT), "qk_norm_rope"),
    "qk_norm_rope two streams": (_heads, (PACKED, WEIGHT, WEIGHT) * 2, "qk_norm_rope"),
    "causal_conv3d": (ops.causal_conv3d, (MAP, TAPS, TAPS[:1]), "causal_conv3d"),
    "causal_conv3d past": (_continued, (MAP, TAPS, TAPS[:1], MAP), "causal_conv3d"),
    "upsample_causal_conv3d past": (_doubled, (MAP, TAPS, TAPS[:1], FRAME), "causal_conv3d"),
    "attention": (ops.attention, (HEADED,) * 3, "attention"),
    "attention prefixes": (_prefixes, (HEADED,) * 3, "attention"),
    "attention own queries": (_own, ((BATCH, 3, HEADS, HEAD_DIM), HEADED, HEADED), "attention"),
    "merge_attention": (ops.merge_attention, (HEADED, NUMBERS) * 2, "merge_attention"),
    "frame_causal_attention": (_frames, (HEADED,) * 3, "frame_causal_attention"),
    "sliding_tile_attention": (_tiles, (HEADED,) * 3, "sliding_tile_attention"),
}
each_case = pytest.mark.parametrize("case", CASES)


def draw(case: str, generator: torch.Generator) -> tuple[Callable[..., Results], list[Tensor]]:
    """The function of a case, returning a tuple, and its tensors, all of which need gradients."""
    function, shapes, _ = CASES[case]

    def call(*tensors: Tensor) -> Results:
        results = function(*tensors)
        return results if isinstance(results, tuple) else (results,)

    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return call, [t.requires_grad_() for t in tensors]


def differentiate(results: Results, leaves: list[Tensor], **options: bool) -> Results:
    """Gradients of a sum that is not the same for all elements."""
    total = sum(t.sin().sum() for t in results if t.requires_grad)
    return torch.autograd.grad(total, leaves, **options)


def run(function: Callable[..., Results], leaves: list[Tensor]) -> Results:
    results = function(*leaves)
    return *(t.detach() for t in results), *differentiate(results, leaves)


def assert_same(actual: Results, expected: Results) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert_equal(got, wanted)
