"""Attention of others by the functions that they tell their users to call.

The kernels behind them also take part behind our contract (``library_impl.<name>``); here is what
they take without it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit.case import Call, Peer, Unavailable

# Package on PyPI, module and function of FlashAttention; all take (B, L, N, D).
_FLASH = {
    "flash-attn 2": ("flash-attn", "flash_attn", "flash_attn_func"),
    "flash-attn 3": ("flash-attn-3", "flash_attn_interface", "flash_attn_func"),
    "flash-attn 4": ("flash-attn-4", "flash_attn.cute", "flash_attn_func"),
}


def peers(
    batch: int, lengths: Sequence[int] | None, length: int, device: torch.device
) -> list[Peer]:
    """``varlen_attn`` of torch, and FlashAttention 2, 3 and 4 where they are installed.

    lengths: of the samples, where not all of them are ``length``
    """
    if device.type != "cuda":
        return []
    found = [Peer("varlen_attn", lambda: _varlen(batch, lengths, length, device))]
    for name, place in _FLASH.items():
        found.append(Peer(name, lambda place=place: _flash(*place, whole=lengths is None)))
    return found


def _varlen(batch: int, lengths: Sequence[int] | None, length: int, device: torch.device) -> Call:
    """Every sample is a sequence, or two, tokens and padding; boundaries are made before."""
    module = "torch.nn.attention.varlen"
    if find_spec(module) is None:
        raise Unavailable("this torch has no varlen_attn")
    attend: Callable[..., Any] = import_module(module).varlen_attn

    ends = _boundaries(batch, lengths, length, device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out: Tensor = attend(*flat, ends, ends, length, length)
        return out.view(q.shape)

    return call


def _boundaries(
    batch: int, lengths: Sequence[int] | None, length: int, device: torch.device
) -> Tensor:
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    if lengths is None:
        return starts
    valid = torch.tensor(lengths, dtype=torch.int32, device=device)
    return torch.cat((torch.stack((starts[:-1], starts[:-1] + valid), 1).flatten(), starts[-1:]))


def _flash(package: str, module: str, function: str, *, whole: bool) -> Call:
    try:
        if find_spec(module) is None:
            raise Unavailable(f"{package} is not installed")
    except ModuleNotFoundError:  # nor is the package around it
        raise Unavailable(f"{package} is not installed") from None
    if not whole:
        raise Unavailable("takes whole samples; with lengths see library_impl")
    attend: Callable[..., Any] = getattr(import_module(module), function)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = attend(q, k, v)  # some versions return the log-sum-exp beside it
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return call
