"""Calls of frame-causal attention, its truth by an explicit mask, and when a result is right."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.ops import frame_causal_attention
from tests.kit.emulation import FlashAttention
from tests.kit.numerics import assert_as_good_as

ROOM = "frame_causal_attention"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """q, k, v and the gradient of the output, and how many tokens a frame has."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    tokens: int
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, float]:
        return *self.tensors, self.tokens, self.scale

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        tensors = {name: change(getattr(self, name)) for name in ("q", "k", "v", "dout")}
        return replace(self, **tensors)


def draw_call(
    generator: torch.Generator,
    *,
    frames: int = 3,
    tokens: int = 5,
    past: int = 0,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """``frames`` frames of queries, and as many keys and ``past`` frames more."""

    def normal(count: int) -> Tensor:
        shape = batch, count * tokens, heads, head_dim
        return torch.randn(shape, generator=generator).to(dtype)

    everything = past + frames
    q, k, v, dout = normal(frames), normal(everything), normal(everything), normal(frames)
    return Call(q, k, v, dout, tokens, head_dim**-0.5)


def answering(dtype: torch.dtype) -> list[str]:
    """The implementations that answer calls of this dtype here."""
    call = draw_call(torch.Generator(), dtype=dtype)
    found = implementations(ROOM).items()
    return [name for name, impl in found if impl.supports(*call.arguments) is None]


def default(call: Call) -> str:
    """Who answers when nobody is named."""
    reasons = explain(ROOM, *call.arguments)
    return next(name for name, reason in reasons.items() if reason is None)


def run(name: str, call: Call) -> list[Tensor]:
    """out, dq, dk, dv of one implementation."""
    leaves = [x.detach().requires_grad_() for x in call.tensors]
    with use(name, ROOM):
        out = frame_causal_attention(*leaves, tokens_per_frame=call.tokens, scale=call.scale)
        return [out.detach(), *torch.autograd.grad(out, leaves, call.dout)]


def visible(call: Call) -> Tensor:
    """Which keys each query may see, (Lq, Lk)."""
    keys = torch.arange(call.k.shape[1])
    queries = keys[call.k.shape[1] - call.q.shape[1] :]
    return keys // call.tokens <= queries[:, None] // call.tokens


def masked(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv by a mask, in ``dtype`` throughout: float64 is the truth."""
    *leaves, dout = (x.detach().cpu().to(dtype, copy=True) for x in (*call.tensors, call.dout))
    q, k, v = (x.requires_grad_().transpose(1, 2) for x in leaves)
    scores = (q * call.scale) @ k.mT
    scores = scores.masked_fill(~visible(call), -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def log_sum_exp(call: Call) -> Tensor:
    """(B, N, Lq) in float64."""
    q, k, _ = (x.detach().cpu().double().transpose(1, 2) for x in call.tensors)
    scores = (call.scale * (q @ k.mT)).masked_fill(~visible(call), -torch.inf)
    return scores.logsumexp(-1)


@dataclass(frozen=True, kw_only=True)
class Emulated:
    """Frame after frame through an emulated kernel; the defaults are right.

    rounds_shares: each frame's share of dk and dv is rounded to the dtype of the inputs, as by the
        kernels of torch; they are added up in fp32 in any case.
    seen: how many keys the queries of a frame see, of ``visible`` that they should.
    """

    kernel: FlashAttention = field(default_factory=FlashAttention)
    rounds_shares: bool = False
    seen: Callable[[int, int], int] = lambda visible, tokens: visible
    frame: Callable[[slice], slice] = lambda rows: rows
    shares: Callable[[int, int], bool] = lambda frame, frames: True

    def __call__(self, call: Call) -> list[Tensor]:
        """out, dq, dk, dv."""
        q, k, v, dout = (x.cpu() for x in (*call.tensors, call.dout))
        past = k.shape[1] - q.shape[1]
        out, dq = torch.zeros_like(q), torch.zeros_like(q)
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
        frames = q.shape[1] // call.tokens
        for frame in range(frames):
            rows = slice(frame * call.tokens, (frame + 1) * call.tokens)
            seen = min(self.seen(past + rows.stop, call.tokens), k.shape[1])
            part = self._frame(*(q[:, rows], k[:, :seen], v[:, :seen], dout[:, rows]), call.scale)
            written = self.frame(rows)
            out[:, written], dq[:, written] = part[:2]
            if self.shares(frame, frames):
                dk[:, :seen] += part[2]
                dv[:, :seen] += part[3]
        return [out, dq, dk.to(k.dtype), dv.to(v.dtype)]

    def _frame(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> list[Tensor]:
        dtype, lengths = q.dtype, [k.shape[1]] * len(q)
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


def emulation_of(name: str, call: Call) -> Emulated:
    """How an implementation rounds."""
    if name == "reference":
        kernel = FlashAttention(round_probabilities=lambda p, _: p)
        return Emulated(kernel=kernel)
    if name == "library_impl" and not call.q.is_cuda:
        # torch's CPU kernel keeps dk and dv in the dtype of the inputs between blocks of queries.
        block = 64 if call.tokens >= 192 else 32
        return Emulated(kernel=FlashAttention(gradient_block=block), rounds_shares=True)
    return Emulated(rounds_shares=name in ("library_impl", "cpu_impl"))


def judge(
    name: str,
    results: list[Tensor],
    call: Call,
    emulated: Callable[[Call], list[Tensor]] | None = None,
) -> None:
    """Tier B for out, dq, dk and dv."""
    dtype = call.q.dtype
    exact, same_dtype = masked(call, torch.float64), masked(call, dtype)
    golden = (emulated or emulation_of(name, call))(call)
    labels = ("out", "dq", "dk", "dv")
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
