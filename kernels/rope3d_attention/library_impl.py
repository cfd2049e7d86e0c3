"""Attention by the kernels that come with torch: its CPU flash kernel, and FlashAttention on CUDA.

These answer where nothing has been measured. The other kernels of torch and of packages that may be
installed stand beside them in ``libraries``; a measured ranking lets the fastest one answer.
"""

from types import ModuleType

from torch import Tensor

from hunyuan_fast.kernels.rope3d_attention.libraries import cpu_flash, flash

VERIFIED_ON = cpu_flash.VERIFIED_ON | flash.VERIFIED_ON


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> str | None:
    """``None`` when torch has a kernel for these tensors, else the reason."""
    if q.device.type not in ("cpu", "cuda"):
        return f"torch brings attention kernels for cpu and cuda, got {q.device.type}"
    return kernel(q).supports(q, k, v, kv_len, scale, out, q_len)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    out: Tensor | None = None,
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, L, N, D), written into ``out`` if given, and log-sum-exp (B, N, L)."""
    return kernel(q).forward(q, k, v, kv_len, scale, out, q_len)


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float,
    q_len: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like q, k and v."""
    return kernel(q).backward(dout, out, lse, q, k, v, kv_len, scale, q_len)


def kernel(q: Tensor, *_: object) -> ModuleType:
    """Which library this is for a call."""
    return cpu_flash if q.device.type == "cpu" else flash
