"""Attention over tokens that lie on several processes, each keeping its own queries.

Formula and contract of the merge: ``hunyuan_fast.kernels.ring_attention``. Keys and values go round
a ring: in as many hops as there are processes, every process computes attention of its queries over
what is there, and merges it into what it has by the log-sum-exp. In the backward pass keys and
values go round again, and behind them their gradients, each process adding its share. Memory for
others' tokens: two blocks of keys and values, and in the backward pass three of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from hunyuan_fast.dispatch import select
from hunyuan_fast.distributed.collectives import all_gather_parts, group_named
from hunyuan_fast.distributed.rotation import Transfer, rotate
from hunyuan_fast.ops.attention_checks import (
    check_kv_len,
    check_kv_len_of_all,
    check_lengths,
    check_tensors,
)
from hunyuan_fast.ops.operator import define, refuse_second_derivative
from hunyuan_fast.ops.rope3d_attention import attention, attention_backward

_ROOM = "ring_attention"
COMPUTE = "ring: compute"  # the name of each hop's attention in profiles
_KEYS, _GRADIENTS = 0, 1  # tags of messages


def merge_attention(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over some keys, and over others, merged into attention over all of them.

    out, part: (B, L, N, D), as ``attention`` returns them, any strides; out fp32 or float64
    lse, part_lse: (B, N, L), dtype of out, their log-sum-exp; -inf where a row has seen no key,
        which is then without effect, whatever it holds
    in_place: write the result into out and lse and return them; inference only

    Returns out and lse. Differentiable in all four.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    _check_merge(out, lse, part, part_lse)
    if not in_place:
        return _merge(out, lse, part, part_lse)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, lse, part, part_lse)):
        raise ValueError(
            "in_place is for inference: autograd cannot follow a write into out; "
            "leave it out, or use torch.no_grad()"
        )
    _merge_in_place(out, lse, part, part_lse)
    return out, lse


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    group: ProcessGroup | None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the queries of this process over the valid keys of all in the group.

    q, k, v: (B, L, N, D), the tokens of this process, of which each sample has a valid prefix; as
        many as lie here, none too. B, N and D are the same everywhere.
    kv_len: valid tokens of each sample, int32 or int64: (B,) here, or (ranks, B) everywhere, which
        the processes otherwise tell each other first; ``None``: all
    lengths: L of each process; ``None``: they tell each other, and the host waits
    scale: factor of the scores, 1/sqrt(D) when ``None``
    group: the processes; ``None`` for this one alone
    return_lse: also return the log-sum-exp (B, N, L), without a gradient

    Returns (B, L, N, D), zero from the valid tokens on, or that and the log-sum-exp: what
    ``attention`` gives for these rows of the whole sequence. The gradients of k and v are of all
    processes' losses together.
    Raises TypeError or ValueError where arguments do not fit.
    """
    check_tensors(q, k, v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if group is None:
        if kv_len is not None and kv_len.dim() == 2:
            check_kv_len_of_all(kv_len, q, 0, 1)
            kv_len = kv_len[0]
        return attention(q, k, v, kv_len=kv_len, scale=scale, return_lse=return_lse)
    kv_len, lengths = _everywhere(q, kv_len, lengths, group)
    out, lse = _ring(q, k, v, kv_len, lengths, float(scale), group.group_name)
    return (out, lse) if return_lse else out


def _everywhere(
    q: Tensor, kv_len: Tensor | None, lengths: Sequence[int] | None, group: ProcessGroup
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Valid tokens (ranks, B) and all tokens of every process."""
    rank, ranks = group.rank(), group.size()
    if lengths is None:
        here = torch.tensor([q.shape[1]], device=q.device)
        lengths = all_gather_parts(here, (1,) * ranks, group, 0).tolist()
    lengths = tuple(lengths)
    if len(lengths) != ranks:
        raise ValueError(f"lengths must be {ranks} numbers, one for each rank, got {lengths}")
    if lengths[rank] != q.shape[1]:
        raise ValueError(
            f"lengths must say {q.shape[1]} for rank {rank}, as many tokens as q has, got {lengths}"
        )
    if kv_len is not None and kv_len.dim() == 2:
        check_kv_len_of_all(kv_len, q, rank, ranks)
    elif kv_len is not None:
        check_kv_len(kv_len, q)
        kv_len = all_gather_parts(kv_len[None], (1,) * ranks, group, 0)
    return kv_len, lengths


def _merge_kernel(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    return select(_ROOM, out, lse, part, part_lse).forward(out, lse, part, part_lse)


def _fake_merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _merge_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dout is None and dlse is None:
        return None, None, None, None
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[0])
    return _merge_backward(dout, dlse, *ctx.saved_tensors)


def _merge_in_place_kernel(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    select(_ROOM, out, lse, part, part_lse, True).forward(out, lse, part, part_lse, True)


def _fake_merge_in_place(*_: Any) -> None:
    return None


def _merge_backward_kernel(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return select(_ROOM, *args).backward(dout, dlse, *args)


def _fake_merge_backward(dout: Tensor, dlse: Tensor | None, *args: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args)


def _ring_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    group = group_named(name)
    _check_all_lengths(kv_len, lengths)
    with torch.no_grad():
        return _forward_hops(q, k, v, _valid(q, kv_len, lengths), lengths, scale, group)


def _ring_backward_kernel(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    group = group_named(name)
    valid = _valid(q, kv_len, lengths)
    with torch.no_grad():
        return _backward_hops((dout, out, lse), (q, k, v), valid, lengths, scale, group)


def _forward_hops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    lengths: Sequence[int],
    scale: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """out, rounded once, and lse of the queries here over the keys of all."""
    rank = group.rank()
    batch, length, num_heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    total = q.new_zeros(q.shape, dtype=wide)
    total_lse = q.new_full((batch, num_heads, length), -torch.inf, dtype=wide)
    for owner, keys, values in _keys_of_all(k, v, lengths, group):
        if not length or not lengths[owner]:
            continue
        with record_function(COMPUTE):
            # the tokens here, the first hop, are queries and keys
            q_len = None if owner == rank else valid[rank]
            options: dict[str, Any] = {"kv_len": valid[owner], "q_len": q_len, "scale": scale}
            part, part_lse = attention(q, keys, values, **options, return_lse=True)
            if owner == rank:
                total, total_lse = part.to(wide), part_lse
            else:
                merge_attention(total, total_lse, part, part_lse, in_place=True)
    return total.to(q.dtype), total_lse


def _backward_hops(
    results: tuple[Tensor, Tensor, Tensor],
    heads: tuple[Tensor, Tensor, Tensor],
    valid: Tensor,
    lengths: Sequence[int],
    scale: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, summed in the dtype of lse.

    The gradients of a block are begun by the process after its owner, which has it first, and come
    home after the last hop; the owner keeps its own share meanwhile.
    """
    q, k, v = heads
    wide, rank, ranks = results[2].dtype, group.rank(), group.size()
    dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in heads)
    transfer: Transfer | None = None
    for owner, keys, values in _keys_of_all(k, v, lengths, group):
        found = None
        if q.shape[1] and lengths[owner]:
            with record_function(COMPUTE):
                options = valid[owner], scale, valid[rank]
                found = attention_backward(*results, q, keys, values, *options)
                dq += found[0]
        if owner == rank:  # the first hop
            if found is not None:
                dk += found[1]
                dv += found[2]
            continue
        share = dk.new_zeros(_packed_shape(k, lengths[owner]))
        if found is not None:
            share[0], share[1] = found[1:]
        if transfer is not None:
            share += transfer.wait()
        arriving = dk.new_empty(_packed_shape(k, lengths[(owner - 1) % ranks]))
        transfer = Transfer(share, arriving, group, _GRADIENTS)
    if transfer is not None:
        shares_of_others = transfer.wait()
        dk += shares_of_others[0]
        dv += shares_of_others[1]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _keys_of_all(
    k: Tensor, v: Tensor, lengths: Sequence[int], group: ProcessGroup
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every process's keys and values with their owner, those here first."""
    shapes = [_packed_shape(k, length) for length in lengths]
    packed = torch.stack((k, v)) if group.size() > 1 else None
    if packed is None:
        yield group.rank(), k, v
        return
    for owner, block in rotate(packed, shapes, group, tag=_KEYS):
        yield owner, block[0], block[1]


def _packed_shape(k: Tensor, length: int) -> tuple[int, ...]:
    batch, _, num_heads, dim = k.shape
    return 2, batch, length, num_heads, dim


def _valid(q: Tensor, kv_len: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Valid tokens of every process and sample, (ranks, B)."""
    if kv_len is not None:
        return kv_len
    all_of_them = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    return all_of_them[:, None].expand(-1, q.shape[0]).contiguous()


def _check_all_lengths(kv_len: Tensor | None, lengths: Sequence[int]) -> None:
    for rank, length in enumerate(lengths):
        check_lengths(None if kv_len is None else kv_len[rank], length)


def _fake_ring(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = q.shape[0], q.shape[2], q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=wide)


def _save_ring(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_len, lengths, scale, name = inputs
    ctx.options = tuple(lengths), scale, name
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, q, k, v, kv_len)


def _ring_gradients(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    out, *rest = ctx.saved_tensors
    if dout is None:  # the others of the ring need this process all the same
        dout = torch.zeros_like(out)
    return *_ring_backward(dout, out, *rest, *ctx.options), None, None, None, None


def _fake_ring_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_PARTS = "Tensor lse, Tensor part, Tensor part_lse"
_merge = define(
    f"merge_attention(Tensor out, {_PARTS}) -> (Tensor, Tensor)",
    _merge_kernel,
    _fake_merge,
    save=_save_merge,
    gradients=_merge_gradients,
)
_merge_in_place = define(
    "merge_attention_(Tensor(a!) out, Tensor(b!) lse, Tensor part, Tensor part_lse) -> ()",
    _merge_in_place_kernel,
    _fake_merge_in_place,
)
_merge_backward = define(
    f"merge_attention_bwd(Tensor dout, Tensor? dlse, Tensor out, {_PARTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _merge_backward_kernel,
    _fake_merge_backward,
    gradients=refuse_second_derivative("merge_attention"),
)
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? kv_len, int[] lengths, float scale, str group"
_ring = define(
    f"ring_attention({_ARGUMENTS}) -> (Tensor, Tensor)",
    _ring_kernel,
    _fake_ring,
    save=_save_ring,
    gradients=_ring_gradients,
)
_ring_backward = define(
    f"ring_attention_bwd(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    _ring_backward_kernel,
    _fake_ring_backward,
    gradients=refuse_second_derivative("ring_attention"),
)


def _check_merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    if out.dim() != 4:
        raise ValueError(f"out must be (B, L, N, D), got shape {tuple(out.shape)}")
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64, it adds up, got {out.dtype}")
    if not part.is_floating_point():
        raise TypeError(f"part must hold floating-point numbers, got {part.dtype}")
    rows = out.shape[0], out.shape[2], out.shape[1]
    for name, x, shape in (
        ("lse", lse, rows),
        ("part", part, tuple(out.shape)),
        ("part_lse", part_lse, rows),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(x.shape)}")
        if x.device != out.device:
            raise ValueError(f"{name} must be on {out.device} like out, got {x.device}")
        if name != "part" and x.dtype != out.dtype:
            raise TypeError(f"{name} must have the dtype of out, {out.dtype}, got {x.dtype}")
