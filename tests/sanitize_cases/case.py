"""What a case is: one call of an implementation, beside the reference in float64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hunyuan_fast import dispatch

Arguments = tuple[Any, ...]
# Makes of a module a context in which it runs without a GPU.
Stand = Callable[[ModuleType], AbstractContextManager[object]]
HALF, WIDE = torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """``ROOM/IMPL/WHAT``.

    part: the function that is called, of the implementation and of the reference
    make: draws its arguments, tensors on the CPU
    ways: keywords that the implementation alone takes
    bound: root mean square of the error over that of the truth. The tests judge how exact a kernel
        is; here a wrong one shall be seen
    here: how the implementation runs without a GPU; None where it cannot
    set: attributes of the module that choose another way through it, on a GPU too
    slow: takes seconds where it is interpreted, and runs no kernel that another case does not
    """

    room: str
    impl: str
    what: str
    make: Callable[[torch.Generator], Arguments]
    part: str = "forward"
    ways: Mapping[str, Any] = field(default_factory=dict)
    bound: float = 0.02
    here: Stand | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    truth: Callable[..., Any] | None = None
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.room}/{self.impl}/{self.what}"

    @property
    def module(self) -> ModuleType:
        """The implementation; by its name, since the dispatcher loads no CUDA without a GPU."""
        return import_module(f"hunyuan_fast.kernels.{self.room}.{self.impl}")

    def missing(self) -> str | None:
        """Why it cannot be run on this machine, or None."""
        if torch.cuda.is_available():
            return None if self.impl in dispatch.implementations(self.room) else "is not built"
        if self.here is None:
            return "needs a GPU"
        return None

    def run(self) -> None:
        """Call the implementation once. Raises AssertionError when its result is another."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        arguments = self.make(generator)
        reference = import_module(f"hunyuan_fast.kernels.{self.room}.reference")
        truth = self.truth or getattr(reference, self.part)
        exact = truth(*(_doubled(a) for a in arguments))
        on_gpu = torch.cuda.is_available()
        module = self.module
        moved = tuple(_moved(a) if on_gpu else a for a in arguments)
        stand = nullcontext() if on_gpu or self.here is None else self.here(module)
        with torch.no_grad(), stand, replaced(module, self.set):
            results = getattr(module, self.part)(*moved, **self.ways)
        compare(results, exact, self.bound, self.name)


def compare(results: Any, exact: Any, bound: float, name: str) -> None:
    """All tensors of both, one by one."""
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (results, exact))
    assert len(got) == len(wanted), f"{name}: {len(got)} results, not {len(wanted)}"
    for index, (result, truth) in enumerate(zip(got, wanted, strict=True)):
        label = f"{name}: result {index}"
        if truth is None or result is None:
            assert truth is result is None, f"{label} is {result}, not {truth}"
            continue
        value, truth = result.detach().double().cpu(), truth.double()
        finite = truth.isfinite()
        assert torch.equal(value.isfinite(), finite), f"{label}: infinite or NaN elsewhere"
        value, truth = value[finite], truth[finite]
        scale = truth.square().mean().sqrt().item() if truth.numel() else 0.0
        error = (value - truth).square().mean().sqrt().item() if truth.numel() else 0.0
        assert error <= bound * scale + 1e-6, f"{label}: error {error:.3g} at a size of {scale:.3g}"


@contextmanager
def replaced(module: ModuleType, attributes: Mapping[str, Any]) -> Iterator[None]:
    """A module with other attributes, for as long as the context lasts."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def interpreted(**attributes: Any) -> Stand:
    """Triton's interpreter, with what the module would choose on Hopper."""
    return lambda module: replaced(module, attributes)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Numbers of a bell curve, in a dtype of the kernel's."""
    return torch.randn(shape, generator=generator).to(dtype)


def sliced(x: Tensor, gap: int = 3) -> Tensor:
    """The same numbers as columns of a wider tensor: rows begin at no multiple of 16 bytes."""
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + gap), torch.nan)
    view = wider[..., gap:]
    view.copy_(x)
    return view


def _moved(value: Any) -> Any:
    """To the GPU with its strides, which ``Tensor.cuda`` does not promise."""
    if not isinstance(value, Tensor):
        return value
    if not value.numel() or value.is_contiguous():
        return value.cuda()
    reach = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    start = value.storage_offset()
    whole = torch.full((start + reach,), 0, dtype=value.dtype, device="cuda")
    view = whole.as_strided(value.shape, value.stride(), start)
    return view.copy_(value)


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value
