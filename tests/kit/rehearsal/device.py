"""Which tensors are on the device, and what may not be done with them.

The mark is on the storage, so that views share it. A mode below autograd hands it from inputs to
results, and refuses what CUDA refuses: inputs of two devices, and waits during a capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten.set_.source_Storage_storage_offset}
# Indices may be on the host, from where they are copied.
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
_INDEXING |= {_aten._index_put_impl_.default, _aten._unsafe_index.Tensor}
# What returns numbers, or shapes that depend on values.
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default}
_WAITS |= {_aten.equal.default, _aten._unique2.default, _aten.repeat_interleave.Tensor}

_STRICT = {_aten.cat.default, _aten.stack.default, _aten.equal.default}

_true_device = torch._C.TensorBase.device.__get__


class State:
    """Of the pretended device."""

    hidden = 0  # greater: the machinery is at work, and everything is on the CPU
    sync_debug = "default"
    tape: list[Callable[[], None]] | None = None  # of the graph that is being captured
    allocated = 0
    peak = 0
    backward = False  # zeros for missing gradients are made on the device of the others


@contextmanager
def hidden() -> Iterator[None]:
    """Nothing is pretended in the block: tensors are those of the CPU, which they are."""
    State.hidden += 1
    try:
        yield
    finally:
        State.hidden -= 1


def is_on_device(x: Tensor) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter) and _true_device(x).type == "cpu"
    return plain and getattr(x.untyped_storage(), "pretended", False)


def place(x: Any, on_device: bool) -> None:
    """Say where the memory of a fresh tensor is."""
    storage = x.untyped_storage()
    before = getattr(storage, "pretended", False)
    if before == on_device:
        return
    storage.pretended = on_device
    if on_device:
        _count(storage.nbytes())
        storage.counted = weakref.finalize(storage, _count, -storage.nbytes())
    else:
        storage.counted()


def _count(num_bytes: int) -> None:
    State.allocated += num_bytes
    State.peak = max(State.peak, State.allocated)


def waits(what: str) -> None:
    """The host waits for the device: an error where it must not."""
    if State.hidden:
        return
    if State.tape is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")
    if State.sync_debug == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


class Device(TorchDispatchMode):
    """Every operator of torch, as a machine with two memories has them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if State.hidden:
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [is_on_device(x) for x in tensors]
        if any(here):
            _check(func, tensors, here, kwargs)
        results = func(*args, **kwargs)
        on_device = any(here) or (not tensors and State.backward)
        if func in _COPIES:
            on_device = here[0]
        fresh = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in tensors if _true_device(x).type == "cpu"}
        for x in fresh:
            if (
                on_device
                and _true_device(x).type == "cpu"
                and x.untyped_storage()._cdata not in known
            ):
                place(x, True)
        if State.tape is not None and (on_device or not tensors):
            record(lambda: func(*args, **kwargs), fresh, known)
        return results


def record(again: Callable[[], Any], results: list[Tensor], known: set[int]) -> None:
    """Note a step of the graph: to be done again into the same memory."""
    fresh = [x.untyped_storage()._cdata not in known for x in results]

    def step() -> None:
        with torch.no_grad():
            anew = [x for x in tree_leaves(again()) if isinstance(x, Tensor)]
            for old, new, is_fresh in zip(results, anew, fresh, strict=True):
                if is_fresh and old.numel():
                    old.copy_(new)

    assert State.tape is not None
    State.tape.append(step)


def _check(func: Any, tensors: list[Tensor], here: list[bool], kwargs: dict[str, Any]) -> None:
    if func in _WAITS:
        waits(str(func))
    if all(here):
        return
    if func in _COPIES:
        if not kwargs.get("non_blocking"):
            waits(str(func))
        return
    if func in _INDEXING and here[0]:
        waits(str(func))
        return
    # numbers of the host go along with tensors of the device
    strangers = [x for x, its in zip(tensors, here, strict=True) if not its and x.dim()]
    if strangers or func in _STRICT:
        shapes = [tuple(x.shape) for x in tensors]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu: {func} of {shapes}, of which on the device: {here}"
        )
