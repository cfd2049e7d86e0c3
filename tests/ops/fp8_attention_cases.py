"""Calls of fp8 attention, an independent account of its roundings, and when a result is right."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations
from hunyuan_fast.kernels.fp8_attention import reference
from hunyuan_fast.kernels.fp8_attention.reference import Codes, Statistics
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.numerics import assert_as_good_as, assert_same_codes

ROOM = "fp8_attention"
E4M3 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]
    scale: float

    @property
    def kv_len(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        return *self.tensors, self.kv_len, self.scale

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        return replace(self, q=change(self.q), k=change(self.k), v=change(self.v))


def draw_call(
    generator: torch.Generator,
    *,
    length: int = 70,
    lengths: tuple[int, ...] = (70, 33),
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    outliers: float = 1.0,
    bias: float = 1.0,
) -> Call:
    """Queries, keys and values with biases per feature; NaN past the valid tokens.

    outliers: how many times larger some features of queries and keys are than the others, the
        biases of those keys ten times again, as after the norms of trained transformers
    bias: of keys and values, in deviations
    """
    shape = len(lengths), length, heads, head_dim

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    loud = torch.ones(heads, head_dim)
    loud[:, :: max(1, head_dim // 4)] = outliers
    q = normal(*shape) * loud
    k = (normal(*shape) + bias * normal(heads, head_dim)) * loud
    if outliers > 1:
        k = k + 10 * bias * torch.where(loud > 1, normal(heads, head_dim), 0.0)
    v = normal(*shape) * normal(heads, head_dim).exp() + bias * normal(heads, head_dim)
    # Scores of deviation 1, however loud the features.
    scale = float(loud.pow(4).sum(-1).mean().rsqrt())
    for x in (q, k, v):
        for item, valid in enumerate(lengths):
            x[item, valid:] = torch.nan
    return Call(q.to(dtype), k.to(dtype), v.to(dtype), lengths, scale)


def answering() -> list[str]:
    """The implementations that answer here."""
    call = draw_call(torch.Generator())
    found = implementations(ROOM).items()
    return [name for name, impl in found if impl.supports(*call.arguments) is None]


def run(name: str, call: Call) -> Tensor:
    return implementations(ROOM)[name].forward(*call.arguments)


def statistics(call: Call) -> Statistics:
    return reference.statistics(call.k, call.v, call.kv_len)


def clean(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v on the CPU with zeros for padding."""
    valid = torch.arange(call.q.shape[1]) < torch.tensor(call.lengths)[:, None]
    return [torch.where(valid[..., None, None], x.cpu().to(dtype), 0.0) for x in call.tensors]


def truth(call: Call, dtype: torch.dtype = torch.float64) -> Tensor:
    """Attention without codes, in ``dtype`` throughout."""
    return plain_attention(*clean(call, dtype), list(call.lengths), call.scale)[0]


def butterflies(x: Tensor) -> Tensor:
    """The rotation by index: each feature with the one whose number differs in one bit."""
    feature = torch.arange(x.shape[-1])
    step = 1
    while x.shape[-1] % (2 * step) == 0:
        other = x[..., feature ^ step]
        x = torch.where((feature & step).bool(), other - x, x + other)
        step *= 2
    return x


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """What is to be rounded to codes, in fp32, and the scales, each step replaceable.

    The steps are written anew, by index and by loops.
    """

    centre_keys: bool = True
    centre_values: bool = True
    rotate: Callable[[Tensor], Tensor] = butterflies
    query_block: int = 64
    key_block: int = 128
    valid: Callable[[int], int] = lambda n: n

    def __call__(self, call: Call, known: Statistics) -> Codes:
        batch, length, heads, head_dim = call.q.shape
        padded = -(-length // 128) * 128
        size = head_dim & -head_dim
        known = Statistics(*(x.cpu() for x in known))
        means = [
            torch.zeros_like(known.key_mean),
            known.key_mean if self.centre_keys else torch.zeros_like(known.key_mean),
            known.value_mean if self.centre_values else torch.zeros_like(known.value_mean),
        ]
        q, k, v = (torch.zeros(batch, heads, padded, head_dim) for _ in range(3))
        for item, n in enumerate(call.lengths):
            n = min(self.valid(n), length)
            for x, source, mean in zip((q, k, v), call.tensors, means, strict=True):
                rows = source[item, :n].float().cpu() - mean[item]
                x[item, :, :n] = rows.transpose(0, 1)
        q, k = self.rotate(q), self.rotate(k)
        q_peak, k_peak = self._peaks(q, self.query_block), self._peaks(k, self.key_block)
        v_peak = known.value_peak
        if not self.centre_values:
            v_peak = v.abs().amax(2).clamp_min(2.0**-50)
        order = torch.tensor(
            [16 * (p // 16) + 8 * (p % 4 // 2) + 2 * (p % 16 // 4) + p % 2 for p in range(padded)]
        )
        log2_e = 1.4426950408889634
        return Codes(
            q=q * (448 / q_peak.repeat_interleave(self.query_block, 2)[..., None]),
            q_scale=(q_peak * (call.scale * log2_e / (448 * size))).clamp_min(2.0**-60),
            k=k * (448 / k_peak.repeat_interleave(self.key_block, 2)[..., None]),
            k_scale=k_peak / 448,
            v=(v * (448 / v_peak)[:, :, None])[:, :, order].mT.contiguous(),
            v_scale=v_peak / 448,
            v_mean=means[2],
        )

    @staticmethod
    def _peaks(x: Tensor, block: int) -> Tensor:
        parts = [part.abs().amax((2, 3)) for part in x.split(block, 2)]
        return torch.stack(parts, -1).clamp_min(2.0**-50)


def judge_codes(name: str, codes: Codes, call: Call, known: Statistics) -> None:
    """Tier C for codes, a few units in the last place for scales."""
    scaled = Scaled()(call, known)
    for part in Codes._fields:
        got, wanted = getattr(codes, part).cpu(), getattr(scaled, part)
        if got.dtype == E4M3:
            assert got.is_contiguous()
            assert_same_codes(got, wanted, name=f"{part} of {name}")
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0.0)


@dataclass(frozen=True, kw_only=True)
class Emulated:
    """Codes made and attended to with every rounding of a kernel, by the kit's emulation.

    top: what a probability of one is coded as.
    """

    scaled: Scaled = field(default_factory=Scaled)
    kernel: FlashAttention = field(default_factory=lambda: FlashAttention(block=64))
    top: float = 256.0
    code: Callable[[Tensor], Tensor] = lambda x: x.clamp(-448, 448).to(E4M3).float()
    round: Callable[[Tensor, torch.dtype], Tensor] = lambda x, dtype: x.to(dtype)
    write: Callable[[Tensor], Tensor] = lambda y: y

    def __call__(self, call: Call, known: Statistics | None = None) -> Tensor:
        codes = self.scaled(call, known or statistics(call))
        length = call.q.shape[1]
        q, k, v = (self.code(x) for x in (codes.q, codes.k, codes.v))
        q = q * codes.q_scale.repeat_interleave(self.scaled.query_block, 2)[..., None]
        k = k * codes.k_scale.repeat_interleave(self.scaled.key_block, 2)[..., None]
        tokens = torch.arange(v.shape[-1])
        position = tokens // 16 * 16 + tokens % 8 // 2 * 4 + tokens % 16 // 8 * 2 + tokens % 2
        v = v[..., position].mT
        kernel = replace(
            self.kernel,
            exp=lambda x: self.kernel.exp(x * 0.6931471805599453),
            round_probabilities=lambda p, _: self.code(p * self.top) / self.top,
            round=lambda x, _: x,
        )
        heads = [x.transpose(1, 2)[:, :length] for x in (q, k, v)]
        out, _ = kernel.forward(*heads, [self.scaled.valid(n) for n in call.lengths], 1.0)
        out = out * codes.v_scale[:, None] + codes.v_mean[:, None]
        valid = torch.arange(length) < torch.tensor(call.lengths)[:, None]
        out = torch.where(valid[..., None, None], out, 0.0)
        return self.write(self.round(out, call.q.dtype))


def judge(
    name: str, result: Tensor, call: Call, emulated: Callable[[Call], Tensor] | None = None
) -> None:
    """Tier B, plain torch being the right emulation: nothing else has these roundings."""
    assert result.dtype == call.q.dtype
    exact = truth(call)
    golden = (emulated or Emulated())(call)
    assert_as_good_as(result.cpu(), exact, golden, golden, name=f"out of {name}")


def errors(result: Tensor, call: Call) -> tuple[float, float]:
    """Cosine similarity to the truth over all outputs, and the error relative to its norm."""
    exact, got = truth(call).flatten(), result.cpu().double().flatten()
    cosine = torch.nn.functional.cosine_similarity(got, exact, 0)
    return float(cosine), float((got - exact).norm() / exact.norm())
