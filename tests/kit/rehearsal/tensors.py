"""Tensors and generators that say they are on the device, and functions that put them there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from tests.kit.rehearsal.device import (
    CPU,
    CUDA,
    State,
    _true_device,
    is_on_device,
    place,
    waits,
)

_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
_DRAWN = ("normal_", "uniform_", "random_", "exponential_", "bernoulli_")
_to = Tensor.to


class Generator(torch.Generator):
    """Random numbers of the CPU, by the name of the device that asks for them."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self._where = _named(device)
        return self

    def __init__(self, device: Any = "cpu") -> None:
        """The device was told to ``__new__``."""

    @property
    def device(self) -> torch.device:
        return self._where


def install(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Patch torch by ``set_attribute(owner, name, value)``."""
    for function in _device_constructors():
        name = function.__name__
        if getattr(torch, name, None) is function and "sparse" not in name:
            set_attribute(torch, name, _factory(function))
    for name in _LIKE:
        set_attribute(torch, name, _factory(getattr(torch, name)))
    for name in _NEW:
        set_attribute(Tensor, name, _factory(getattr(Tensor, name)))
    for name in _DRAWN:
        set_attribute(Tensor, name, _drawn(getattr(Tensor, name)))
    set_attribute(torch, "Generator", Generator)
    set_attribute(Tensor, "device", property(_device))
    set_attribute(Tensor, "is_cuda", property(lambda x: _device(x).type == "cuda"))
    set_attribute(Tensor, "is_cpu", property(lambda x: _device(x).type == "cpu"))
    set_attribute(Tensor, "get_device", lambda x: 0 if x.is_cuda else -1)
    set_attribute(Tensor, "to", _moved)
    set_attribute(Tensor, "cuda", _to_cuda)
    set_attribute(Tensor, "cpu", lambda x, **more: _moved(x, CPU, **more))
    set_attribute(Tensor, "pin_memory", lambda x: x.clone())
    set_attribute(Tensor, "record_stream", lambda x, stream: None)
    for name in ("numpy", "__array__"):
        set_attribute(Tensor, name, _of_the_host(getattr(Tensor, name)))
    set_attribute(Tensor, "tolist", _read(Tensor.tolist))


def _device(x: Tensor) -> torch.device:
    return CUDA if not State.hidden and is_on_device(x) else _true_device(x)


def _named(device: Any) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal: {device}")
    return CUDA if device.type == "cuda" else device


def _faking() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _factory(function: Callable) -> Callable:
    """The same, for which the pretended device is one."""

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        if State.hidden or _faking():
            return function(*args, **kwargs)
        data = args[0] if args else None
        like = data if isinstance(data, Tensor) else None
        device = kwargs.pop("device", None)
        if device is None and like is None:  # a block may have named another, "meta"
            _check_generator(kwargs.get("generator"), CPU)
            return function(*args, **kwargs)
        target = (like.device if like is not None else CPU) if device is None else _named(device)
        kwargs.pop("pin_memory", None)
        _check_generator(kwargs.get("generator"), target)
        if target.type == "meta":
            return function(*args, device=target, **kwargs)
        name = function.__name__
        if name in ("as_tensor", "asarray", "new_tensor", "tensor") and target == CUDA:
            if not (name in ("as_tensor", "asarray") and like is not None and like.is_cuda):
                waits(f"{name} copies to the device")
                kwargs["device"] = CPU
                result = function(*args, **kwargs)
                if isinstance(data, Tensor) or hasattr(data, "__array__"):
                    result = result.clone()
                place(result, True)
                return result
            return function(*args, **kwargs)
        result = function(*args, device=CPU, **kwargs)
        if name in ("as_tensor", "asarray"):
            if like is not None and like.is_cuda:
                return _moved(result, target)
            return result
        place(result, target == CUDA)
        return result

    return made


def _drawn(function: Callable) -> Callable:
    @functools.wraps(function)
    def drawn(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not State.hidden:
            _check_generator(kwargs.get("generator"), x.device)
        return function(x, *args, **kwargs)

    return drawn


def _check_generator(generator: Any, target: torch.device) -> None:
    if generator is not None and generator.device.type != target.type:
        raise RuntimeError(
            f"Expected a '{target.type}' device type for generator but found "
            f"'{generator.device.type}'"
        )


def _moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, between memories too."""
    if State.hidden or _faking() or _true_device(x).type != "cpu":
        return _to(x, *args, **kwargs)
    copy, device = kwargs.pop("copy", False), None
    if (args and isinstance(args[0], Tensor)) or "other" in kwargs:
        other = args[0] if args else kwargs["other"]
        device, dtype, non_blocking, layout = other.device, other.dtype, False, None
    else:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    layout = torch.preserve_format if layout is None else layout
    dtype = x.dtype if dtype is None else dtype
    target = x.device if device is None else _named(device)
    if target == x.device:
        return _to(x, dtype=dtype, copy=copy, memory_format=layout)
    if target.type == "meta":
        return _to(x, device=target, dtype=dtype)
    if not non_blocking:
        waits(f"a copy of {tuple(x.shape)} to {target}")
    result = _to(x, dtype=dtype, copy=True, memory_format=layout)
    place(result, target == CUDA)
    return result


def _to_cuda(x: Tensor, device: Any = None, **options: Any) -> Tensor:
    return _moved(x, CUDA if device is None else device, **options)


def _of_the_host(function: Callable) -> Callable:
    @functools.wraps(function)
    def checked(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_cuda:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        return function(x, *args, **kwargs)

    return checked


def _read(function: Callable) -> Callable:
    @functools.wraps(function)
    def read(x: Tensor) -> Any:
        if x.is_cuda:
            waits(function.__name__)
        return function(x)

    return read
