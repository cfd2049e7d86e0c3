"""Calls of sliding-tile attention, its truth by a mask, and when a result is right."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import sliding_tile_attention
from tests.kit.emulation import FlashAttention
from tests.kit.numerics import assert_as_good_as

ROOM = "sliding_tile_attention"
HALF = (torch.bfloat16, torch.float16)
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Call:
    """q, k, v and the gradient of the output, and who sees whom."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    windows: Tensor
    grid: Sizes
    tile: Sizes
    lengths: tuple[int, ...] | None
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def kv_len(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor(self.lengths, device=self.q.device)

    @property
    def arguments(self) -> tuple:
        """As implementations take them."""
        return *self.tensors, self.windows, self.grid, self.tile, self.kv_len, self.scale

    @property
    def flat(self) -> tuple:
        """As operators take them."""
        return *self.tensors, self.windows, *self.grid, *self.tile, self.kv_len, self.scale

    @property
    def options(self) -> dict:
        """As the public function takes them."""
        names = ("windows", "grid", "tile", "kv_len", "scale")
        return {name: getattr(self, name) for name in names}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        return replace(
            self, **{name: change(getattr(self, name)) for name in ("q", "k", "v", "dout")}
        )

    def to(self, device: str) -> "Call":
        return replace(self.map(lambda x: x.to(device)), windows=self.windows.to(device))


def draw_call(
    generator: torch.Generator,
    *,
    grid: Sizes = (2, 3, 3),
    tile: Sizes = (2, 2, 2),
    windows: tuple[Sizes, ...] = ((1, 1, 1), (9, 9, 9)),
    text: int = 5,
    lengths: tuple[int, ...] | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """A sample for each of ``lengths``, or one; a head for each of ``windows``."""
    video = grid[0] * grid[1] * grid[2]
    shape = len(lengths or (0,)), video + text, len(windows), head_dim
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    table = torch.tensor(windows, dtype=torch.int32)
    return Call(*tensors, table, grid, tile, lengths, head_dim**-0.5)


def answering(dtype: torch.dtype) -> list[str]:
    """The implementations that answer calls of this dtype here."""
    call = draw_call(torch.Generator(), dtype=dtype)
    found = implementations(ROOM).items()
    return [name for name, impl in found if impl.supports(*call.arguments) is None]


def run(name: str | None, call: Call) -> list[Tensor]:
    """out, lse, dq, dk, dv of one implementation; ``None``: of the one that answers."""
    leaves = [x.detach().requires_grad_() for x in call.tensors]
    with use(name, ROOM) if name else nullcontext():
        out, lse = sliding_tile_attention(*leaves, **call.options, return_lse=True)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, call.dout)]


def first_tile(i: int, window: int, count: int) -> int:
    """The first of the tiles that tile i sees along an axis with ``count`` of them."""
    return min(max(i - window // 2, 0), max(count - window, 0))


def sees(query: Sizes, key: Sizes, window: Sizes, grid: Sizes, tile: Sizes) -> bool:
    """Whether the token at one place of the grid sees that at another: one pair at a time."""
    for at, other, size, length, step in zip(query, key, window, grid, tile, strict=True):
        first = first_tile(at // step, size, -(-length // step))
        if not first <= other // step < first + size:
            return False
    return True


@lru_cache(maxsize=64)
def _near(window: Sizes, grid: Sizes, tile: Sizes) -> Tensor:
    """Which video tokens each video token sees."""
    places = list(itertools.product(*map(range, grid)))
    return torch.tensor([[sees(a, b, window, grid, tile) for b in places] for a in places])


def visible(call: Call) -> Tensor:
    """Which keys each query may see, (N, L, L), before lengths count."""
    length = call.q.shape[1]
    found = torch.ones(len(call.windows), length, length, dtype=torch.bool)
    for head, window in enumerate(call.windows.tolist()):
        near = _near(tuple(window), call.grid, call.tile)
        found[head, : len(near), : len(near)] = near
    return found


def _seen(call: Call) -> Tensor:
    """Which keys each query sees, (B, N, L, L)."""
    length = call.q.shape[1]
    lengths = call.lengths or (length,) * len(call.q)
    valid = torch.arange(length) < torch.tensor(lengths)[:, None]
    return visible(call) & valid[:, None, :, None] & valid[:, None, None, :]


def masked(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv by a mask, in ``dtype`` throughout: float64 is the truth."""
    given = (*call.tensors, call.dout)
    *leaves, dout = (x.detach().cpu().to(dtype, copy=True) for x in given)
    q, k, v = (x.requires_grad_().transpose(1, 2) for x in leaves)
    seen = _seen(call)
    scores = ((q * call.scale) @ k.mT).masked_fill(~seen, -torch.inf)
    # rows without a key: softmax would give NaN
    scores = torch.where(seen.any(-1, keepdim=True), scores, 0.0)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    out = (weights @ v).transpose(1, 2)
    lse = torch.where(seen.any(-1), scores.logsumexp(-1), -torch.inf).detach()
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout)]


@dataclass(frozen=True, kw_only=True)
class Emulated:
    """Groups of queries that see the same through an emulated kernel; the defaults are right.

    rounds_shares: each group's share of dk and dv is rounded to the dtype of the inputs, as by the
        kernels of torch; they are added up in fp32 in any case.
    see: who sees whom, (N, L, L).
    padding: whether it takes no part.
    keep: whether a group's gradients reach its keys.
    """

    kernel: FlashAttention = field(default_factory=FlashAttention)
    rounds_shares: bool = False
    see: Callable[[Call], Tensor] = visible
    padding: bool = True
    keep: Callable[[int, int], bool] = lambda group, groups: True

    def __call__(self, call: Call) -> list[Tensor]:
        """out, dq, dk, dv."""
        q, k, v, dout = (x.cpu() for x in (*call.tensors, call.dout))
        out, dq = torch.zeros_like(q), torch.zeros_like(q)
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
        seen = self.see(call)
        length = q.shape[1]
        for item, valid in enumerate(call.lengths or (length,) * len(q)):
            limit = valid if self.padding else length
            for head in range(q.shape[2] if limit else 0):
                patterns, group_of = seen[head, :limit, :limit].unique(dim=0, return_inverse=True)
                for group, pattern in enumerate(patterns):
                    rows, keys = (group_of == group).nonzero()[:, 0], pattern.nonzero()[:, 0]
                    at = item, rows, head
                    given = (q[at], k[item, keys, head], v[item, keys, head], dout[at])
                    part = self._group(*(x[None, :, None] for x in given), call.scale)
                    out[at], dq[at] = (x[0, :, 0] for x in part[:2])
                    if self.keep(group, len(patterns)):
                        dk[item, keys, head] += part[2][0, :, 0]
                        dv[item, keys, head] += part[3][0, :, 0]
        return [out, dq, dk.to(k.dtype), dv.to(v.dtype)]

    def _group(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> list[Tensor]:
        dtype, lengths = q.dtype, [k.shape[1]]
        kernel = replace(self.kernel, num_queries=lambda *_: q.shape[1])
        out, lse = kernel.forward(q, k, v, lengths, scale)
        args = dout, out, lse, q, k, v
        if not self.rounds_shares:
            # Results that stay in fp32, from products of the same roundings.
            args = tuple(x.float() for x in args)
            kernel = replace(
                kernel, round_probabilities=lambda p, _: self.kernel.round_probabilities(p, dtype)
            )
        dq, dk, dv = kernel.backward(*args, lengths, scale)
        return [out, self.kernel.round(dq, dtype), dk, dv]


def emulation_of(name: str, call: Call) -> Callable[[Call], list[Tensor]]:
    """How an implementation rounds."""
    if name == "reference":
        return Emulated(kernel=FlashAttention(round_probabilities=lambda p, _: p))
    # torch's CPU kernel keeps dk and dv in the dtype of the inputs between blocks of queries.
    if name == "library_impl":
        return Emulated(kernel=FlashAttention(gradient_block=32), rounds_shares=True)
    return Emulated()


def judge(
    name: str,
    results: list[Tensor],
    call: Call,
    emulated: Callable[[Call], list[Tensor]] | None = None,
) -> None:
    """Tier B for out, dq, dk and dv (results may hold the log-sum-exp as well, second of five)."""
    dtype = call.q.dtype
    exact, same_dtype = masked(call, torch.float64), masked(call, dtype)
    if len(results) == 5:
        _judge_sums(results.pop(1).cpu(), exact[1])
    golden = (emulated or emulation_of(name, call))(call)
    labels = ("out", "dq", "dk", "dv")
    for expected in (exact, same_dtype):
        del expected[1]
    for label, result, *others in zip(labels, results, exact, same_dtype, golden, strict=True):
        assert result.dtype == dtype
        assert_as_good_as(
            result.cpu(),
            *others,
            name=f"{label} of {name}",
            # With fp32 inputs only the order of summation is left to compare, and it is anyone's.
            factor=3.0 if dtype == torch.float32 else 2.0,
            rms_factor=2.0 if dtype == torch.float32 else 1.15,
        )


def _judge_sums(lse: Tensor, exact: Tensor) -> None:
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isneginf(), exact.isneginf())
    error = (lse - exact)[exact.isfinite()].abs()
    # An error e scales a row of probabilities by 1 + e: far below a digit of bf16.
    assert not error.numel() or error.max() < 2**-12
