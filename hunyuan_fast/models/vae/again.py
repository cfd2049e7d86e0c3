"""Keeping for backward how a map is made in place of the map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Make = Callable[[Tensor], Tensor]


@contextmanager
def made_again(made: Tensor, make: Make, x: Tensor) -> Iterator[None]:
    """What keeps `made` for backward within the block, keeps x, of which `make` makes it again.

    make: gives the bits of `made` while no gradients are recorded; it runs under the autocast that
        holds here, and once for each tensor that is asked for.
    """
    kind, source = made.device.type, x.detach()
    storage, shape = made.untyped_storage()._cdata, made.shape
    casts: AbstractContextManager[object] = nullcontext()
    if torch.amp.is_autocast_available(kind):
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        casts = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)

    def again() -> Tensor:
        with torch.no_grad(), casts:
            return make(source)

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        # an operator of torch.library keeps an alias of what it was given
        same = kept.shape == shape and kept.untyped_storage()._cdata == storage
        return again if same else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with saved_tensors_hooks(pack, unpack):
        yield
