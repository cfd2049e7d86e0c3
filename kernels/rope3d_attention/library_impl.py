"""Attention by the kernels that come with torch: its CPU flash kernel, and FlashAttention on CUDA.

Neither needs a mask. On the CPU neighbours of one length share a call on their valid prefix: less
arithmetic than a masked call, and padding is never read. Sort a batch by length to make few calls.
On CUDA each sample becomes two sequences of the variable-length kernel, its prefix and its padding,
so that the host need not know the lengths and nothing is gathered; the padding's own results are
then replaced by zeros. Both return the log-sum-exp that the backward kernel reads.

In half precision the CPU kernel rounds dk and dv after every block of queries (FlashAttention sums
them in fp32): at 200 tokens they are 1.45 times as far off, at 600 tokens 1.75 times.
"""

from itertools import groupby

import torch
from torch import Tensor

VERIFIED_ON = frozenset({"cpu"})

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_forward = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward


def supports(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> str | None:
    """``None`` when torch has a kernel for these tensors, else the reason."""
    if q.device.type not in ("cpu", "cuda"):
        return f"torch brings attention kernels for cpu and cuda, got {q.device.type}"
    if q.numel() == 0:
        return f"the tensors are empty, got q of shape {tuple(q.shape)}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the features of q, k and v must be adjacent in memory"
    if q.device.type == "cpu":
        return None
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"FlashAttention takes head_dim up to 256 in steps of 8, got {q.shape[-1]}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L)."""
    run = _forward_cpu if q.device.type == "cpu" else _forward_cuda
    result, lse = run(q, k, v, kv_len, scale, out)
    if out is not None and result is not out:
        out.copy_(result)
        result = out
    return result, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, L, N, D)."""
    run = _backward_cpu if q.device.type == "cpu" else _backward_cuda
    return run(dout, out, lse, q, k, v, kv_len, scale)


def _prefixes(kv_len: Tensor | None, batch: int, length: int) -> list[tuple[slice, int]]:
    """Slices of the batch and the number of valid tokens that each of them shares."""
    lengths = [length] * batch if kv_len is None else kv_len.tolist()
    slices: list[tuple[slice, int]] = []
    first = 0
    for valid, run in groupby(lengths):
        after = first + len(list(run))
        slices.append((slice(first, after), valid))
        first = after
    return slices


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, num_heads, _ = q.shape
    prefixes = _prefixes(kv_len, batch, length)
    if prefixes == [(slice(0, batch), length)]:
        result, lse = _cpu_forward(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
        return result.transpose(1, 2), lse.contiguous()

    if out is None:
        out = q.new_empty(q.shape)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((batch, num_heads, length), dtype=lse_dtype)
    for items, valid in prefixes:
        if valid:
            prefix = [x[items, :valid].transpose(1, 2) for x in (q, k, v)]
            result, lse[items, :, :valid] = _cpu_forward(*prefix, scale=scale)
            out[items, :valid] = result.transpose(1, 2)
        out[items, valid:] = 0
        lse[items, :, valid:] = -torch.inf
    return out, lse


def _backward_cpu(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = q.shape[:2]
    prefixes = _prefixes(kv_len, batch, length)
    whole = prefixes == [(slice(0, batch), length)]
    gradients = [] if whole else [x.new_empty(x.shape) for x in (q, k, v)]
    for items, valid in prefixes:
        if valid:
            prefix = [x[items, :valid].transpose(1, 2) for x in (dout, q, k, v, out)]
            parts = _cpu_backward(*prefix, lse[items, :, :valid], 0.0, False, scale=scale)
            if whole:
                dq, dk, dv = (part.transpose(1, 2) for part in parts)
                return dq, dk, dv
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[items, :valid] = part.transpose(1, 2)
        for gradient in gradients:
            gradient[items, valid:] = 0
    dq, dk, dv = gradients
    return dq, dk, dv


def _sequences(q: Tensor, kv_len: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Boundaries of the sequences in the flattened batch, and which tokens are padding (B, L)."""
    batch, length = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    if kv_len is None:
        return starts, None
    kv_len = kv_len.to(torch.int32)
    starts_and_ends = torch.stack((starts[:-1], starts[:-1] + kv_len), dim=1)
    boundaries = torch.cat((starts_and_ends.flatten(), starts[-1:]))
    padding = torch.arange(length, device=q.device) >= kv_len[:, None]
    return boundaries, padding


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, num_heads, _ = q.shape
    boundaries, padding = _sequences(q, kv_len)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    result, lse, *_ = _cuda_forward(
        *flat, boundaries, boundaries, length, length, 0.0, False, False, scale=scale
    )
    result = result.unflatten(0, (batch, length))
    lse = lse.view(num_heads, batch, length).transpose(0, 1).contiguous()
    if padding is not None:
        result = result.masked_fill_(padding[:, :, None, None], 0)
        lse = lse.masked_fill_(padding[:, None], -torch.inf)
    return result, lse


def _backward_cuda(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = q.shape[:2]
    boundaries, padding = _sequences(q, kv_len)
    flat = [x.flatten(0, 1) for x in (dout, q, k, v, out)]
    # Without dropout the kernel reads no random state; it still asks for two tensors of that kind.
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    gradients = _cuda_backward(
        *flat,
        lse.transpose(0, 1).flatten(1),
        boundaries,
        boundaries,
        length,
        length,
        0.0,
        False,
        random_state,
        unused,
        scale=scale,
    )
    gradients = [x.unflatten(0, (batch, length)) for x in gradients]
    if padding is not None:
        # A select: the padding's own gradients may be NaN.
        gradients = [x.masked_fill(padding[:, :, None, None], 0) for x in gradients]
    dq, dk, dv = (x.contiguous() for x in gradients)
    return dq, dk, dv
