"""Calls of attention over valid prefixes, their truth, and when a result is right."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops.rope3d_attention import attention
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.numerics import assert_as_good_as

ROOM = "rope3d_attention"
HALF = (torch.bfloat16, torch.float16)
LABELS = ("out", "lse", "dq", "dk", "dv")


def _of_torch(q: Tensor, lengths: list[int]) -> FlashAttention:
    """torch's CPU kernel keeps dk and dv in the dtype of the inputs between blocks of queries."""
    if q.is_cuda:
        return FlashAttention()
    return FlashAttention(gradient_block=64 if max(lengths) >= 192 else 32)


def _of_triton(q: Tensor, lengths: list[int]) -> FlashAttention:
    from hunyuan_fast.kernels.rope3d_attention.config import forward_tile

    return FlashAttention(block=forward_tile(q.shape[3]).keys)


# How each implementation rounds; who is not here as FlashAttention does, by tiles of 64 keys.
EMULATIONS: dict[str, Callable[[Tensor, list[int]], FlashAttention]] = {
    "reference": lambda q, lengths: FlashAttention(round_probabilities=lambda p, _: p),
    "library_impl": _of_torch,
    "triton_impl": _of_triton,
}


def draw_inputs(
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def answering(dtype: torch.dtype) -> list[str]:
    """The implementations that answer calls of this dtype on the CPU."""
    q = torch.zeros(1, 2, 1, 16, dtype=dtype)
    found = implementations(ROOM).items()
    return [name for name, impl in found if impl.supports(q, q, q, None, 1.0) is None]


def each_answer(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parametrises ``name`` and ``dtype``: every implementation in every dtype that it answers."""
    found = [(name, dtype) for dtype in dtypes for name in answering(dtype)]
    ids = [f"{name}-{str(dtype)[6:]}" for name, dtype in found]
    return pytest.mark.parametrize(("name", "dtype"), found, ids=ids)


def run(
    name: str,
    inputs: list[Tensor],
    lengths: list[int] | None,
    scale: float,
    queries: list[int] | None = None,
) -> list[Tensor]:
    """out, lse, dq, dk, dv of one implementation. queries: ``q_len``."""
    q, k, v, dout = inputs
    kv_len, q_len = (
        None if numbers is None else torch.tensor(numbers, device=q.device)
        for numbers in (lengths, queries)
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with use(name, ROOM):
        out, lse = attention(*leaves, kv_len=kv_len, q_len=q_len, scale=scale, return_lse=True)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout)]


def plain(
    inputs: list[Tensor],
    lengths: list[int],
    scale: float,
    dtype: torch.dtype,
    queries: list[int] | None = None,
) -> list[Tensor]:
    """The same by plain torch in ``dtype``; float64 is the truth."""
    q, k, v, dout = (x.detach().cpu().to(dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = plain_attention(*leaves, lengths, scale, queries)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def rounding_of(name: str, q: Tensor, lengths: list[int]) -> FlashAttention:
    """The roundings of an implementation. lengths: of the queries."""
    return EMULATIONS.get(name, lambda q, lengths: FlashAttention())(q, lengths)


def emulated(
    name: str,
    inputs: list[Tensor],
    lengths: list[int],
    scale: float,
    queries: list[int] | None = None,
) -> list[Tensor]:
    """The same with the roundings of an implementation."""
    kernel = rounding_of(name, inputs[0], queries or lengths)
    q, k, v, dout = (x.cpu() for x in inputs)
    out, lse = kernel.forward(q, k, v, lengths, scale, queries)
    return [out, lse, *kernel.backward(dout, out, lse, q, k, v, lengths, scale, queries)]


@dataclass(frozen=True)
class Truth:
    """A call with its exact results and those of plain torch, to judge many results by."""

    inputs: list[Tensor]
    lengths: list[int]
    scale: float
    exact: list[Tensor]
    same_dtype: list[Tensor]
    queries: list[int] | None = None

    @classmethod
    def of(
        cls,
        inputs: list[Tensor],
        lengths: list[int],
        scale: float,
        queries: list[int] | None = None,
    ) -> "Truth":
        exact, same = (
            plain(inputs, lengths, scale, dtype, queries)
            for dtype in (torch.float64, inputs[0].dtype)
        )
        return cls(inputs, lengths, scale, exact, same, queries)

    def emulated(self, name: str) -> list[Tensor]:
        return emulated(name, self.inputs, self.lengths, self.scale, self.queries)

    def judge_out(self, name: str, out: Tensor, golden: list[Tensor]) -> None:
        self._judge(0, name, out, golden)

    def judge_gradients(self, name: str, gradients: list[Tensor], golden: list[Tensor]) -> None:
        for index, gradient in enumerate(gradients, start=2):
            self._judge(index, name, gradient, golden)

    def judge_lse(self, lse: Tensor) -> None:
        lse, exact = lse.cpu(), self.exact[1]
        assert lse.dtype == torch.float32
        assert torch.equal(lse.isneginf(), exact.isneginf())
        error = (lse - exact)[exact.isfinite()].abs()
        # An error e in the log-sum-exp scales a row of probabilities by 1 + e: far below a bf16
        # digit.
        assert not error.numel() or error.max() < 2**-12, "log-sum-exp is off by more than 2^-12"

    def _judge(self, index: int, name: str, result: Tensor, golden: list[Tensor]) -> None:
        dtype = self.inputs[0].dtype
        assert result.dtype == dtype
        assert_as_good_as(
            result.cpu(),
            self.exact[index],
            self.same_dtype[index],
            golden[index],
            name=f"{LABELS[index]} of {name}",
            # With fp32 inputs only the order of summation is left to compare, and it is anyone's.
            factor=3.0 if dtype == torch.float32 else 2.0,
            rms_factor=2.0 if dtype == torch.float32 else 1.15,
        )


def judge(
    name: str,
    results: list[Tensor],
    inputs: list[Tensor],
    lengths: list[int],
    scale: float,
    queries: list[int] | None = None,
) -> None:
    """Tier B for out, dq, dk and dv; and the log-sum-exp."""
    truth = Truth.of(inputs, lengths, scale, queries)
    golden = truth.emulated(name)
    truth.judge_out(name, results[0], golden)
    truth.judge_gradients(name, results[2:], golden)
    truth.judge_lse(results[1])


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Equal but for the order of summation, which matrix products choose by alignment and size."""
    rtol, atol = (1e-5, 1e-6) if result.dtype == torch.float32 else (2**-7, 2**-9)
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)
