"""Calls to measure and to judge: what ``hunyuan-fast bench attention`` draws, runs and compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention import reference
from hunyuan_fast.kernels.rope3d_attention.shape_class import ShapeClass, shape_class

# How far off rounding may take a result, root mean square over that of the truth. A kernel that
# rounds probabilities and the result stays near half a unit in the last place; torch's on the CPU,
# which rounds gradients again and again, within one and a half. Leaving out one key of 200 costs
# more than twice the limit of bfloat16.
_LIMIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5, torch.float64: 1e-12}
# Single rows scatter around that.
_ROW = 4.0
# The error e of a log-sum-exp scales a row of probabilities by 1 + e.
_LSE_LIMIT = 2**-11
# The truth is for some heads: they do not know of each other.
_JUDGED_HEADS = 2
# Beyond this the reference, which stores scores, is not worth waiting for.
_LONGEST_REFERENCE = {"cpu": 2048, "cuda": 16384}


class Inputs(NamedTuple):
    """Tensors of one call; what is past a sample's length is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    kv_len: Tensor | None
    scale: float
    q_len: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | float | None, ...]:
        """The call's, as an implementation takes them."""
        own = () if self.q_len is None else (None, self.q_len)
        return self.q, self.k, self.v, self.kv_len, self.scale, *own


@dataclass(frozen=True)
class Problem:
    """One call of ``attention``: forward, or forward and backward.

    lengths: the number of valid tokens of every sample; None: all, and no ``kv_len``
    queries: how many of ``query_length`` queries of their own every sample has; None: they are
        those of the tokens of the keys, and there is no ``q_len``
    """

    dtype: torch.dtype
    batch: int
    length: int
    num_heads: int
    head_dim: int
    lengths: tuple[int, ...] | None = None
    training: bool = False
    query_length: int = 0
    queries: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.length}x{self.num_heads}x{self.head_dim}"
        lengths = "" if self.lengths is None else f":{','.join(map(str, self.lengths))}"
        what = "forward+backward" if self.training else "forward"
        return f"{shape}{lengths} {str(self.dtype)[6:]} {what}"

    @property
    def shape_class(self) -> ShapeClass:
        """The class that the measurement is of, which is never one of queries of their own."""
        shape = (self.batch, self.length, self.num_heads, self.head_dim)
        q = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=self.training)
        kv_len = None if self.lengths is None else torch.empty(self.batch, device="meta")
        return shape_class(q, q, q, kv_len, 1.0)

    @property
    def flops(self) -> int:
        """Two matrix products forward, five backward, over pairs of valid tokens."""
        pairs = sum(n * n for n in self.lengths or (self.length,) * self.batch)
        return (7 if self.training else 2) * 2 * pairs * self.num_heads * self.head_dim

    @property
    def trials(self) -> "list[Problem]":
        """Small calls with the same kernels that are full of edges."""
        small = replace(self, batch=2, length=197, num_heads=2)
        if self.lengths is None:
            return [replace(small, lengths=None), replace(small, length=64)]
        return [
            replace(small, batch=7, lengths=(197, 196, 130, 64, 1, 0, 197)),
            replace(small, lengths=(0, 197)),
            # The class is also that of calls with queries of their own.
            replace(
                replace(small, batch=5, length=130, lengths=(130, 0, 64, 1, 130)),
                query_length=197,
                queries=(197, 196, 64, 0, 1),
            ),
        ]

    def worth_timing(self, name: str, device: torch.device) -> bool:
        """Whether a candidate could win."""
        return name != "reference" or self.length <= _LONGEST_REFERENCE[device.type]

    def draw(self, device: torch.device, seed: int = 0) -> Inputs:
        """Inputs of one call on a device."""
        generator = torch.Generator(device).manual_seed(seed)
        kv_len, q_len = (
            None if numbers is None else torch.tensor(numbers, device=device)
            for numbers in (self.lengths, self.queries)
        )

        def draw(length: int, valid: Tensor | None) -> Tensor:
            shape = (self.batch, length, self.num_heads, self.head_dim)
            drawn = torch.randn(shape, generator=generator, device=device).to(self.dtype)
            if valid is None:
                return drawn
            padding = torch.arange(length, device=device) >= valid[:, None]
            return drawn.masked_fill_(padding[:, :, None, None], torch.nan)

        of_queries = (self.length, kv_len) if q_len is None else (self.query_length, q_len)
        of_keys = self.length, kv_len
        q, k, v, dout = (draw(*each) for each in (of_queries, of_keys, of_keys, of_queries))
        return Inputs(q, k, v, dout, kv_len, self.head_dim**-0.5, q_len)

    def run(self, impl: ModuleType, inputs: Inputs) -> list[Tensor]:
        """out and lse of one implementation; dq, dk and dv too when training."""
        out, lse = impl.forward(*inputs.arguments)
        if not self.training:
            return [out, lse]
        own = () if inputs.q_len is None else (inputs.q_len,)
        arguments = *inputs.arguments[:5], *own
        return [out, lse, *impl.backward(inputs.dout, out, lse, *arguments)]

    def truth(self, inputs: Inputs) -> list[Tensor]:
        """The same by the reference with more digits, for the heads that are judged."""
        digits = torch.float64 if self.dtype.itemsize > 2 else torch.float32
        q, k, v, dout = (x[:, :, self._heads].to(digits) for x in inputs[:4])
        return self.run(reference, Inputs(q, k, v, dout, *inputs[4:]))  # type: ignore[arg-type]

    def error(self, results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        """Distance from the truth, in parts of what rounding may cause: up to 1 agrees."""
        limit, errors = _LIMIT[self.dtype], []
        for i, (result, exact) in enumerate(zip(results, truth, strict=True)):
            if i == 1:
                errors.append(self._error_of_lse(result, exact))
                continue
            if result.shape[:2] != exact.shape[:2] or result.dtype != self.dtype:
                return float("inf")
            judged = result[:, :, self._heads].to(exact.dtype)
            rows = (judged - exact).square().mean(-1)
            scale = exact.square().mean().sqrt().clamp_min(1e-30)
            errors.append(rows.mean().sqrt() / scale / limit)
            errors.append(rows.max().sqrt() / scale / limit / _ROW)
            errors.append(self._padding_is_zero(result, i in (0, 2)))
        worst = torch.stack([each.double().cpu() for each in errors]).max()
        return float("inf") if worst.isnan() else worst.item()

    @property
    def _heads(self) -> list[int]:
        step = max(1, (self.num_heads - 1) // (_JUDGED_HEADS - 1))
        return list(range(0, self.num_heads, step))[:_JUDGED_HEADS]

    def _error_of_lse(self, lse: Tensor, exact: Tensor) -> Tensor:
        judged = lse[:, self._heads].to(exact.dtype)
        nothing = exact.isneginf()
        distance = torch.where(nothing, 0, (judged - exact).abs()).max() / _LSE_LIMIT
        return torch.where((judged.isneginf() == nothing).all(), distance, torch.inf)

    def _padding_is_zero(self, result: Tensor, of_queries: bool) -> Tensor:
        valid = self.queries if of_queries and self.queries is not None else self.lengths
        if valid is None:
            return torch.zeros(())
        lengths = torch.tensor(valid, device=result.device)
        padding = torch.arange(result.shape[1], device=result.device) >= lengths[:, None]
        touched = (result != 0).any(-1).any(-1) & padding
        return torch.where(touched.any(), torch.inf, 0.0)


def problems(
    device: torch.device, dtypes: Sequence[torch.dtype], *, training: bool
) -> list[Problem]:
    """What is measured when nothing is asked for: the lengths of short and long clips."""
    found = []
    for dtype in dtypes:
        nano = Problem(dtype, 1, 212, 3, 64)
        heads, lengths = (8, (1024, 4608)) if device.type == "cpu" else (24, _LENGTHS)
        whole = [nano, *(Problem(dtype, 1, n, heads, 128) for n in lengths)]
        two = (replace(each, batch=2) for each in whole if each.length <= _LONGEST_BATCH)
        padded = [replace(p, lengths=(p.length - p.length // 20, p.length)) for p in two]
        found += [*whole, *padded]
    return [
        replace(p, training=t) for p in found for t in ((False, True) if training else (False,))
    ]


# Tokens of 256 x 256 with 1, 13 and 65 frames, of 1024 x 1024 with 29, and of 720p with 129.
_LENGTHS = (512, 1280, 4608, 33024, 119056)
_LONGEST_BATCH = 33024


def read_shape(text: str) -> tuple[int, int, int, int, tuple[int, ...] | None]:
    """``BxLxNxD``, or ``BxLxNxD:n,n`` with the valid tokens of every sample. Raises ValueError."""
    shape, colon, lengths = text.partition(":")
    try:
        batch, length, num_heads, head_dim = (int(each) for each in shape.split("x"))
        valid = tuple(int(each) for each in lengths.split(",")) if colon else None
    except ValueError:
        raise ValueError(f"a shape must be BxLxNxD or BxLxNxD:n,n, got {text!r}") from None
    if min(batch, length, num_heads, head_dim) < 1:
        raise ValueError(f"a shape must have positive sizes, got {text!r}")
    if valid is not None and (len(valid) != batch or not all(0 <= n <= length for n in valid)):
        raise ValueError(
            f"a shape must have one number of valid tokens, 0 to {length}, for each of its {batch} "
            f"samples, got {text!r}"
        )
    return batch, length, num_heads, head_dim, valid
