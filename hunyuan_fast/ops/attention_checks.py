"""What the ops of joint attention ask of their arguments.

Raises TypeError or ValueError that name the argument, what was expected and what came.
"""

import torch
from torch import Tensor


def check_tensors(q: Tensor, k: Tensor, v: Tensor, q_len: Tensor | None = None) -> None:
    """q, k and v are (B, L, N, D) of one dtype and device, and of one shape.

    With q_len, queries are those of other tokens than the keys: L may be another one.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, L, N, D), got shape {tuple(q.shape)}")
    shape = q.shape if q_len is None else _shape_of_keys(q, k, q_len)
    for name, x in (("k", k), ("v", v)):
        if x.shape != shape:
            of_whom = "q" if q_len is None or name == "k" else "k"
            raise ValueError(
                f"{name} must have the shape of {of_whom}, {tuple(shape)}, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}; cast it")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if not q.is_floating_point():
        raise TypeError(f"q must hold floating-point numbers, got {q.dtype}")
    if shape[-1] == 0:
        raise ValueError(f"the head dimension D must be at least 1, got shape {tuple(q.shape)}")


def _shape_of_keys(q: Tensor, k: Tensor, q_len: Tensor) -> torch.Size:
    """That of q, with as many tokens as k has."""
    if k.dim() != 4:
        raise ValueError(f"k must be (B, L, N, D), got shape {tuple(k.shape)}")
    check_kv_len(q_len, q, "q_len")
    batch, _, *heads = q.shape
    return torch.Size((batch, k.shape[1], *heads))


def check_kv_len(kv_len: Tensor, q: Tensor, name: str = "kv_len") -> None:
    """One length for each sample, beside q."""
    if kv_len.shape != q.shape[:1]:
        raise ValueError(f"{name} must be (B,) = ({q.shape[0]},), got shape {tuple(kv_len.shape)}")
    if kv_len.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {kv_len.dtype}")
    if kv_len.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {kv_len.device}")


def check_kv_len_of_all(kv_len: Tensor, q: Tensor, rank: int, ranks: int) -> None:
    """One length for each process and sample, beside the q of one of the processes."""
    expected = ranks, q.shape[0]
    if kv_len.shape != expected:
        raise ValueError(f"kv_len must be (ranks, B) = {expected}, got shape {tuple(kv_len.shape)}")
    check_kv_len(kv_len[rank], q)


def check_lengths(kv_len: Tensor | None, length: int, name: str = "kv_len") -> None:
    """Lengths within the sequence; those on a GPU are not looked at, the host would wait."""
    if kv_len is None or kv_len.device.type != "cpu":
        return
    lengths = kv_len.tolist()
    if not all(0 <= n <= length for n in lengths):
        raise ValueError(f"{name} must lie in [0, L] = [0, {length}], got {lengths}")


def check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """A tensor like q to write into, and no gradients wanted."""
    if out.shape != q.shape:
        raise ValueError(f"out must have the shape of q, {tuple(q.shape)}, got {tuple(out.shape)}")
    if out.dtype != q.dtype:
        raise TypeError(f"out must have the dtype of q, {q.dtype}, got {out.dtype}")
    if out.device != q.device:
        raise ValueError(f"out must be on the device of q, {q.device}, got {out.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, out)):
        raise ValueError(
            "out is for inference: autograd cannot follow a write into it; "
            "leave it out, or use torch.no_grad()"
        )
