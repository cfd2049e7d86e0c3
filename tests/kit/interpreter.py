"""Triton's interpreter, made to compute as a GPU does and to watch every address.

As shipped, it keeps bf16 and fp8 as unsigned integers and calculates with the bit patterns, cuts
digits off where a GPU rounds to nearest, reads past the end of tensors in silence, and gives zeros
for masked lanes that a GPU leaves undefined. ``install`` repairs all four, and leaves out work
without a result; ``shuffled_programs`` runs a grid in another order, to show programs that depend
on each other.

It still models one program at a time: races, barriers and approximate instructions stay invisible.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

_Handle = triton_interpreter.TensorHandle
_Builder = triton_interpreter.InterpreterBuilder

# Formats that the interpreter stores as integers, and what torch calls them.
_SMALL = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
}
_UNSIGNED = {np.uint16: torch.uint16, np.uint8: torch.uint8}

_ARITHMETIC = {"binary_op": 2, "unary_op": 1, "create_rsqrt": 1, "create_erf": 1, "create_fma": 3}


class KernelFault(AssertionError):
    """A program did what a GPU would not forgive."""


class OutOfBounds(KernelFault):
    """It touched memory outside every tensor it was given."""


class LossyReduction(KernelFault):
    """It reduced bf16 or fp8 without widening them first."""


def install() -> None:
    """Repair and guard the interpreter of this process; a second call changes nothing."""
    if getattr(_Builder, "hunyuan_fast_installed", False):
        return
    _repair_casts()
    _repair_arithmetic()
    _refuse_small_reductions()
    _undefine_masked_lanes()
    _guard_addresses()
    _count_with_scalars()
    _spare_work()
    _Builder.hunyuan_fast_installed = True


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the programs of every grid launched in the block in a random order."""
    builder = triton_interpreter.interpreter_builder
    original = builder.set_grid_idx
    order: list[np.ndarray] = []

    def set_grid_idx(x: int, y: int, z: int) -> None:
        size = tuple(builder.grid_dim)
        if (x, y, z) == (0, 0, 0):
            order[:] = [np.random.default_rng(seed).permutation(int(np.prod(size)))]
        linear = order[0][np.ravel_multi_index((x, y, z), size)]
        original(*(int(index) for index in np.unravel_index(linear, size)))

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx


def _is_small(handle: Any) -> bool:
    return handle.dtype.scalar in _SMALL


def _to_single(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    torch_dtype, bits = _SMALL[dtype]
    patterns = torch.from_numpy(np.ascontiguousarray(data).view(bits).copy())
    return patterns.view(torch_dtype).float().numpy().reshape(np.shape(data))


def _from_single(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    torch_dtype, bits = _SMALL[dtype]
    single = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
    return single.to(torch_dtype).view(_UNSIGNED[bits]).numpy().reshape(np.shape(data))


def _widen(handle: Any) -> Any:
    if not _is_small(handle):
        return handle
    return _Handle(_to_single(handle.data, handle.dtype.scalar), tl.float32)


def _cast(handle: Any, target: tl.dtype) -> Any:
    """Any number to or from a small format, by way of fp32, rounded to nearest even."""
    data = _widen(handle).data
    if target in _SMALL:
        return _Handle(_from_single(data, target), target)
    return _Handle(data.astype(triton_interpreter._get_np_dtype(target)), target)


def _repair_casts() -> None:
    cast_impl, fp_to_fp = _Builder.cast_impl, _Builder.create_fp_to_fp
    rounding = triton_interpreter._ir.ROUNDING_MODE

    def repaired_cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if _is_small(src) or dst_type.scalar in _SMALL:
            return _cast(src, dst_type.scalar)
        return cast_impl(self, src, dst_type)

    def repaired_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        small = _is_small(src) or dst_type.scalar in _SMALL
        if small and rounding_mode in (None, rounding.RTNE):
            return _cast(src, dst_type.scalar)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    _Builder.cast_impl = repaired_cast_impl
    _Builder.create_fp_to_fp = repaired_fp_to_fp


def _repair_arithmetic() -> None:
    for name, num_operands in _ARITHMETIC.items():
        setattr(_Builder, name, _in_single(getattr(_Builder, name), num_operands))
    _Builder.create_clampf = _in_single(_Builder.create_clampf, 3)

    dot = _Builder.create_dot

    def repaired_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), d, *rest)

    _Builder.create_dot = repaired_dot


def _in_single(operation: Callable, num_operands: int) -> Callable:
    """``operation`` computed in fp32 and rounded once when an operand has a small format."""

    def repaired(self: Any, *args: Any) -> Any:
        operands, rest = args[:num_operands], args[num_operands:]
        small = next((x.dtype.scalar for x in operands if _is_small(x)), None)
        if small is None:
            return operation(self, *args)
        result = operation(self, *(_widen(x) for x in operands), *rest)
        if result.data.dtype == np.bool_:
            return result
        return _Handle(_from_single(result.data, small), small)

    return repaired


def _refuse_small_reductions() -> None:
    check_tensor = triton_interpreter.ReduceScanOpInterface.check_tensor

    def repaired_check_tensor(self: Any, tensors: Any) -> None:
        for x in tensors:
            if x.dtype.scalar in _SMALL:
                raise LossyReduction(
                    f"a reduction over {x.dtype.scalar} loses digits; cast to fp32 first"
                )
        check_tensor(self, tensors)

    triton_interpreter.ReduceScanOpInterface.check_tensor = repaired_check_tensor


def _undefine_masked_lanes() -> None:
    """Lanes masked off in a load without ``other`` hold NaN or the largest integer."""
    masked_load = _Builder.create_masked_load

    # what else is given differs between releases of Triton
    def repaired_masked_load(
        self: Any, ptrs: Any, mask: Any, other: Any, *options: Any, **named: Any
    ) -> Any:
        if other is None:
            dtype = ptrs.get_element_ty()
            np_dtype = triton_interpreter._get_np_dtype(dtype)
            if np_dtype.kind == "f":
                garbage = np.full(ptrs.data.shape, np.nan, np_dtype)
            elif dtype in _SMALL:
                garbage = _from_single(np.full(ptrs.data.shape, np.nan), dtype)
            elif np_dtype.kind in "iu":
                garbage = np.full(ptrs.data.shape, np.iinfo(np_dtype).max, np_dtype)
            else:
                garbage = np.ones(ptrs.data.shape, np_dtype)
            other = _Handle(garbage, dtype)
        return masked_load(self, ptrs, mask, other, *options, **named)

    _Builder.create_masked_load = repaired_masked_load


def _count_with_scalars() -> None:
    """Scalars as bounds of loops, which Triton 3.6 keeps in arrays of one: NumPy 2.5 takes none."""
    patch_tensor = triton_interpreter._patch_lang_tensor

    def repaired_patch_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    triton_interpreter._patch_lang_tensor = repaired_patch_tensor


class _Guard:
    """Stands before the native loads and stores and compares addresses with the arguments."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.extents: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, ptrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check("load", ptrs, mask, np.dtype(dtype).itemsize)
        return self._native.load(ptrs, mask, other, dtype)

    def store(self, ptrs: Any, value: Any, mask: Any) -> Any:
        self._check("store", ptrs, mask, value.dtype.itemsize)
        return self._native.store(ptrs, value, mask)

    def atomic_rmw(self, op: Any, ptrs: Any, value: Any, mask: Any, sem: Any) -> Any:
        self._check("atomic", ptrs, mask, value.dtype.itemsize)
        return self._native.atomic_rmw(op, ptrs, value, mask, sem)

    def atomic_cas(self, ptrs: Any, compare: Any, value: Any, sem: Any) -> Any:
        self._check("atomic", ptrs, np.True_, value.dtype.itemsize)
        return self._native.atomic_cas(ptrs, compare, value, sem)

    def _check(self, what: str, ptrs: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        addresses = np.asarray(ptrs).astype(np.uint64)
        addresses = addresses[np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape)]
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in self.extents:
            inside |= (addresses >= np.uint64(start)) & (
                addresses + np.uint64(num_bytes) <= np.uint64(end)
            )
        if inside.all():
            return
        first = int(addresses[~inside][0])
        start, end = min(
            self.extents or [(0, 0)], key=lambda e: min(abs(first - e[0]), abs(first - e[1]))
        )
        program = tuple(triton_interpreter.interpreter_builder.grid_idx)
        raise OutOfBounds(
            f"program {program}: {what} of {num_bytes} bytes out of bounds in "
            f"{int((~inside).sum())} lanes; the first is {first - start:+d} bytes from the start "
            f"and {first - end:+d} from the end of the nearest argument"
        )


def _guard_addresses() -> None:
    guard = _Guard(triton_interpreter._interpreter)
    triton_interpreter._interpreter = guard
    executor = triton_interpreter.GridExecutor
    init_args, call = executor._init_args_hst, executor.__call__

    def guarded_init_args(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, named = init_args(self, args_dev, kwargs)
        guard.extents = [_extent(x) for x in _tensors([*args, *named.values()])]
        return args, named

    def guarded_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KernelFault):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    executor._init_args_hst = guarded_init_args
    executor.__call__ = guarded_call


def _spare_work() -> None:
    """Leave out what costs more than half of the time and changes nothing."""
    builder = triton_interpreter.interpreter_builder
    if not builder.options.debug:  # sums of integers would be checked, and nobody told
        builder.options = replace(builder.options, sanitize_overflow=False)
    _remember_numpy_dtypes()
    _replace_the_language_once()


def _remember_numpy_dtypes() -> None:
    """Instead of a table made for every question."""
    answer = triton_interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def remembered(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        name = "*" if isinstance(scalar, tl.pointer_type) else scalar.name
        if name not in known:
            known[name] = answer(scalar)
        return known[name]

    triton_interpreter._get_np_dtype = remembered


def _replace_the_language_once() -> None:
    """Once in a launch for functions that see the same modules, not in every call of a helper."""
    executor = triton_interpreter.GridExecutor
    replace_language, call = triton_interpreter._patch_lang, executor.__call__
    replaced: set[frozenset[int]] = set()

    @cache
    def modules(fn: Callable) -> frozenset[int]:
        return frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)

    def replaced_once(fn: Callable) -> Any:
        if modules(fn) in replaced:
            return None  # what is replaced is restored at the end of the launch
        replaced.add(modules(fn))
        return replace_language(fn)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return call(self, *args, **kwargs)

    triton_interpreter._patch_lang = replaced_once
    executor.__call__ = launch


def _tensors(args: list[Any]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(list(arg))
        elif hasattr(arg, "base"):
            yield from _tensors([arg.base])


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First and one past the last byte that the elements of x occupy."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
