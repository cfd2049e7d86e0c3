"""Attention over the keys in parts, merged, as ring attention computes it; and when that is right.

backward of a part is given out and log-sum-exp of all parts: probabilities sum to less than 1.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.ops.rope3d_attention_cases import Truth, draw_inputs, rounding_of

SCALE = 0.3
QUERIES = [21, 0, 13, 21]
LENGTHS = [70, 70, 33, 0]
# Keys of every part, not all alike; the second part of the third sample is cut short, and its third
# part has none.
PARTS = [(0, 24), (24, 41), (41, 70)]


def lengths_of(part: tuple[int, int]) -> list[int]:
    """How many keys of a part every sample has."""
    first, after = part
    return [min(max(n - first, 0), after - first) for n in LENGTHS]


def draw_truth(generator: torch.Generator, dtype: torch.dtype, head_dim: int = 16) -> Truth:
    """One call over all keys, NaN in its padding."""
    q, _, _, dout = draw_inputs((4, 23, 2, head_dim), generator, dtype)
    k, v, *_ = draw_inputs((4, 70, 2, head_dim), generator, dtype)
    for item in range(4):
        for x, numbers in ((q, QUERIES), (dout, QUERIES), (k, LENGTHS), (v, LENGTHS)):
            x[item, numbers[item] :] = torch.nan
    return Truth.of([q, k, v, dout], LENGTHS, SCALE, QUERIES)


def merged(outs: list[Tensor], sums: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp over all parts."""
    lse = torch.stack(sums).logsumexp(0)
    weights = [(each - lse).exp().where(lse.isfinite(), 0.0) for each in sums]
    pairs = zip(outs, weights, strict=True)
    out = sum(x.to(lse.dtype) * w.transpose(1, 2)[..., None] for x, w in pairs)
    return out.to(dtype), lse


Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def in_parts(inputs: list[Tensor], forward: Forward, backward: Backward) -> list[Tensor]:
    """out, lse, dq, dk and dv: both called with a part of the keys and how many there are."""
    q, k, v, dout = inputs
    keys = [(k[:, slice(*part)], v[:, slice(*part)]) for part in PARTS]
    found = [forward(q, *each, lengths_of(p)) for each, p in zip(keys, PARTS, strict=True)]
    out, lse = merged(*(list(x) for x in zip(*found, strict=True)), q.dtype)
    gradients = [
        backward(dout, out, lse, q, *each, lengths_of(p))
        for each, p in zip(keys, PARTS, strict=True)
    ]
    dq, dk, dv = zip(*gradients, strict=True)
    shares = [x.to(lse.dtype) for x in dq]
    return [out, lse, sum(shares).to(q.dtype), torch.cat(dk, dim=1), torch.cat(dv, dim=1)]


def of_implementation(impl: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The same by ``forward`` and ``backward`` of an implementation."""
    q_len = torch.tensor(QUERIES)

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        return impl.forward(q, k, v, torch.tensor(lengths), SCALE, None, q_len)

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, lengths = args
        return impl.backward(*tensors, torch.tensor(lengths), SCALE, q_len)

    return in_parts(inputs, forward, backward)


def golden(name: str, truth: Truth) -> list[Tensor]:
    """The same with the roundings of an implementation."""
    kernel = rounding_of(name, truth.inputs[0], QUERIES)

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        return kernel.forward(q, k, v, lengths, SCALE, QUERIES)

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, lengths = args
        return kernel.backward(*tensors, lengths, SCALE, QUERIES)

    return in_parts(truth.inputs, forward, backward)


def judge_parts(name: str, impl: Any, truth: Truth) -> None:
    """Parts come to the whole."""
    results = of_implementation(impl, truth.inputs)
    wanted = golden(name, truth)
    truth.judge_out(name, results[0], wanted)
    truth.judge_lse(results[1])
    truth.judge_gradients(name, results[2:], wanted)


def _own_softmax(impl: Any) -> Backward:
    """Probabilities that sum to 1 over the keys of the part."""

    def backward(dout, out, lse, q, k, v, kv_len, scale, q_len):
        _, lse = impl.forward(q, k, v, kv_len, scale, None, q_len)
        return impl.backward(dout, out, lse, q, k, v, kv_len, scale, q_len)

    return backward


def _own_delta(impl: Any) -> Backward:
    """delta of what the part alone puts out."""

    def backward(dout, out, lse, q, k, v, kv_len, scale, q_len):
        out, _ = impl.forward(q, k, v, kv_len, scale, None, q_len)
        return impl.backward(dout, out, lse, q, k, v, kv_len, scale, q_len)

    return backward


def _changed(change: Callable[..., tuple[Tensor | None, Tensor]]) -> Callable[[Any], Any]:
    """Both passes with other lengths: ``change(kv_len, q_len, k, q)``."""

    def faulty(impl: Any) -> Any:
        def forward(q, k, v, kv_len, scale, out, q_len):
            kv_len, q_len = change(kv_len, q_len, k, q)
            return impl.forward(q, k, v, kv_len, scale, out, q_len)

        def backward(dout, out, lse, q, k, v, kv_len, scale, q_len):
            kv_len, q_len = change(kv_len, q_len, k, q)
            return impl.backward(dout, out, lse, q, k, v, kv_len, scale, q_len)

        return SimpleNamespace(forward=forward, backward=backward)

    return faulty


def _only_backward(make: Callable[[Any], Backward]) -> Callable[[Any], Any]:
    return lambda impl: SimpleNamespace(forward=impl.forward, backward=make(impl))


# An implementation with one mistake in how it takes queries of their own, or parts of keys.
FAULTS: dict[str, Callable[[Any], Any]] = {
    "probabilities that sum to 1": _only_backward(_own_softmax),
    "delta of the part": _only_backward(_own_delta),
    "q_len ignored": _changed(lambda n, m, k, q: (n, torch.full_like(m, q.shape[1]))),
    "kv_len ignored": _changed(lambda n, m, k, q: (None, m)),
    "kv_len for the queries": _changed(lambda n, m, k, q: (n, n.clamp(max=q.shape[1]))),
    "q_len for the keys": _changed(lambda n, m, k, q: (m.clamp(max=k.shape[1]), m)),
    "a query short": _changed(lambda n, m, k, q: (n, (m - 1).clamp(min=0))),
    "a query too many": _changed(lambda n, m, k, q: (n, m + 1)),
    "a key short": _changed(lambda n, m, k, q: ((n - 1).clamp(min=0), m)),
    "lengths of the first sample": _changed(lambda n, m, k, q: (n, m[:1].expand(4))),
}
