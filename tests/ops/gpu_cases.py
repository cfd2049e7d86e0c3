"""One call of every way through every op, in sizes that kernels for GPUs take."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hunyuan_fast import dispatch, ops
from tests.kit import gpu

Shapes = tuple[tuple[int, ...], ...]
Results = tuple[Tensor, ...]
HEAD_DIM, CHANNELS, MOVED = 128, 64, 4
HEADS, WIDTH, TEXT = gpu.size((2, 256, 50), (1, 64, 3))
BATCH, LENGTH = gpu.size((3, 197), (2, 40))
OURS = ("cuda_impl", "triton_impl")


class Case(NamedTuple):
    """A call. Tensors of as many rows as there are samples are theirs, the others are shared.

    shapes: of the differentiable tensors, by the number of samples and of tokens
    fixed: lengths, indices and tables on the device, by the same
    wide: which of the tensors are fp32
    grows: how much larger than the largest of them the result is
    """

    op: str
    call: Callable[..., Tensor | Results]
    shapes: Callable[[int, int], Shapes]
    fixed: Callable[[int, int], tuple[Tensor, ...]] = lambda batch, length: ()
    wide: tuple[int, ...] = ()
    trained: bool = True
    grows: int = 1

    def draw(
        self, generator: torch.Generator, batch: int = BATCH, length: int = LENGTH
    ) -> list[Tensor]:
        """The differentiable tensors, on the device of the generator."""
        where = {"generator": generator, "device": generator.device}
        return [
            torch.randn(shape, dtype=torch.float32 if i in self.wide else torch.bfloat16, **where)
            for i, shape in enumerate(self.shapes(batch, length))
        ]

    def run(self, name: str, tensors: list[Tensor], fixed: tuple[Tensor, ...]) -> Results:
        """Results of one implementation, and gradients; skips the test where it does not answer."""
        leaves = [t.detach().requires_grad_(self.trained) for t in tensors]
        with dispatch.use(name, self.op):
            try:
                results = self.call(*leaves, *fixed)
            except RuntimeError as refusal:
                if "was asked for by name and cannot answer" not in str(refusal):
                    raise
                pytest.skip(str(refusal))
            results = results if isinstance(results, tuple) else (results,)
            if not self.trained:
                return results
            ends = [r for r in results if r.requires_grad]
            given = [r.detach().nan_to_num(0, 0, 0).sin() for r in ends]
            return *(r.detach() for r in results), *torch.autograd.grad(ends, leaves, given)


def _rows(batch: int, length: int) -> tuple[int, ...]:
    return batch, length, WIDTH


def _heads(batch: int, length: int) -> tuple[int, ...]:
    return batch, length, HEADS, HEAD_DIM


def _packed(batch: int, length: int) -> tuple[int, ...]:
    return batch, length, 3 * HEADS * HEAD_DIM


def _maps(batch: int, length: int, frames: int = 3) -> tuple[int, ...]:
    return batch, CHANNELS, frames, *gpu.size((5, length // 10), (2, length // 20))


def _conv(batch: int, length: int, past: int = 0) -> Shapes:
    shapes = _maps(batch, length), (CHANNELS, CHANNELS, 3, 3, 3), (CHANNELS,)
    return (*shapes, _maps(batch, length, past)) if past else shapes


def _streams(batch: int, length: int, texts: int = 0) -> Shapes:
    weights = (HEAD_DIM,), (HEAD_DIM,)
    return _packed(batch, length), *weights, *((_packed(batch, TEXT), *weights) * texts)


def _lengths(batch: int, length: int) -> tuple[Tensor, ...]:
    """Of every kind: whole, none, and between."""
    return ((length - torch.arange(batch, device="cuda") * 97) % (length + 1),)


def _own_lengths(batch: int, length: int) -> tuple[Tensor, ...]:
    return *_lengths(batch, length // 2), *(n.flip(0) for n in _lengths(batch, length))


def _index(batch: int, length: int) -> tuple[Tensor, ...]:
    return (torch.arange(batch * length, device="cuda").view(batch, length) * 7 % 5 % MOVED,)


def _tables(batch: int, length: int, without: int = 0) -> tuple[Tensor, ...]:
    angles = torch.arange((length - without) * HEAD_DIM // 2, device="cuda").view(
        length - without, -1
    )
    angles = angles.float().repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def _windows(batch: int, length: int) -> tuple[Tensor, ...]:
    rows = [[1, 1, 1], [1, 2, 3]][:HEADS]
    return torch.tensor(rows, dtype=torch.int32, device="cuda"), *_lengths(batch, length)


def _norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Tensor) -> Results:
    *text, cos, sin = rest
    named = dict(zip(("text_qkv", "text_q_weight", "text_k_weight"), text, strict=False))
    return ops.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, num_heads=HEADS, **named)


def _norm_rope_attention(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Tensor) -> Tensor:
    cos, sin, kv_len = rest
    tables = {"num_heads": HEADS, "kv_len": kv_len}
    return ops.norm_rope_attention(qkv, q_weight, k_weight, cos, sin, **tables)


def _tiles(q: Tensor, k: Tensor, v: Tensor, windows: Tensor, kv_len: Tensor) -> Results:
    sizes = {"grid": (2, 3, (q.shape[1] - 9) // 6), "tile": (1, 2, 7), "windows": windows}
    return ops.sliding_tile_attention(q, k, v, **sizes, kv_len=kv_len, return_lse=True)


CASES = {
    "gate": Case(
        *("fused_modulation", ops.gate_residual),
        lambda b, n: (_rows(b, n), _rows(b, n), (b, WIDTH)),
    ),
    "norm": Case(
        *("fused_modulation", ops.layer_norm_modulate),
        lambda b, n: (_rows(b, n), (b, WIDTH), (b, WIDTH)),
    ),
    "gate and norm of indexed vectors": Case(
        "fused_modulation",
        lambda *t: ops.gate_residual_layer_norm_modulate(*t[:5], index=t[5]),
        lambda b, n: (_rows(b, n),) * 2 + ((b, MOVED, WIDTH),) * 3,
        _index,
    ),
    "gelu": Case("gelu_tanh", ops.gelu_tanh, lambda b, n: (_rows(b, n),)),
    "gelu beside": Case(
        *("gelu_tanh", ops.concat_gelu_tanh), lambda b, n: ((b, n, 72), _rows(b, n))
    ),
    "group norm": Case(
        "group_norm_silu",
        lambda x, weight, bias: ops.group_norm_silu(x, 16, weight, bias),
        lambda b, n: (_maps(b, n), (CHANNELS,), (CHANNELS,)),
    ),
    "norm and rotation": Case(
        *("qk_norm_rope", _norm_rope, _streams), lambda b, n: _tables(b, n, without=7)
    ),
    "norm and rotation of two streams": Case(
        *("qk_norm_rope", _norm_rope), lambda b, n: _streams(b, n, texts=1), _tables
    ),
    "convolution": Case("causal_conv3d", ops.causal_conv3d, _conv),
    "convolution, stride, past": Case(
        "causal_conv3d",
        lambda x, weight, bias, past: ops.causal_conv3d(
            x, weight, bias, stride=(1, 2, 2), past=past
        ),
        lambda b, n: _conv(b, n, past=2),
    ),
    "convolution, doubled, past": Case(
        "causal_conv3d",
        lambda x, weight, bias, past: ops.upsample_causal_conv3d(
            x, weight, bias, factor=(2, 2, 2), past=past
        ),
        lambda b, n: _conv(b, n, past=1),
        grows=8,
    ),
    "attention": Case(
        "rope3d_attention",
        lambda q, k, v: ops.attention(q, k, v, return_lse=True),
        lambda b, n: (_heads(b, n),) * 3,
    ),
    "attention over prefixes": Case(
        "rope3d_attention",
        lambda q, k, v, kv_len: ops.attention(q, k, v, kv_len=kv_len, return_lse=True),
        lambda b, n: (_heads(b, n),) * 3,
        _lengths,
    ),
    "attention of own queries": Case(
        "rope3d_attention",
        lambda q, k, v, q_len, kv_len: ops.attention(
            q, k, v, q_len=q_len, kv_len=kv_len, return_lse=True
        ),
        lambda b, n: (_heads(b, n // 2), _heads(b, n), _heads(b, n)),
        _own_lengths,
    ),
    "attention of raw queries": Case(
        *("rope3d_attention", _norm_rope_attention, _streams),
        lambda b, n: (*_tables(b, n, without=7), *_lengths(b, n)),
        trained=False,
    ),
    "merge": Case(
        *("ring_attention", ops.merge_attention),
        lambda b, n: (_heads(b, n), (b, HEADS, n)) * 2,
        wide=(0, 1, 3),
    ),
    "attention of frames": Case(
        "frame_causal_attention",
        lambda q, k, v: ops.frame_causal_attention(q, k, v, tokens_per_frame=k.shape[1] // 4),
        lambda b, n: (_heads(b, 3 * (n // 4)), _heads(b, 4 * (n // 4)), _heads(b, 4 * (n // 4))),
    ),
    "attention of tiles": Case(
        *("sliding_tile_attention", _tiles), lambda b, n: (_heads(b, n),) * 3, _windows
    ),
    "attention in fp8": Case(
        "fp8_attention",
        lambda q, k, v, kv_len: ops.fp8_attention(q, k, v, kv_len=kv_len),
        lambda b, n: (_heads(b, n),) * 3,
        _lengths,
        trained=False,
    ),
}


def who(libraries: bool) -> pytest.MarkDecorator:
    """Parametrises ``name`` and ``case``: every implementation for GPUs with every case it has."""
    found = [
        (name, case)
        for case, each in CASES.items()
        for name in dispatch.choices(each.op)
        if name in OURS or (libraries and name.startswith("library_impl"))
    ]
    return pytest.mark.parametrize(("name", "case"), found)
