"""Kernels of the pretended device: interpreted, emulated, or computed by a stand-in."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.kit.rehearsal.device import State, hidden, place, record

INTERPRET = "TRITON_INTERPRET"  # tests/conftest.py has set it


def install() -> None:
    """Let every implementation for GPUs be loaded, and run without one."""
    from hunyuan_fast import _C, dispatch

    _C.has_cuda = True
    for cached in (dispatch.implementations, dispatch.choices, dispatch._candidates):
        cached.cache_clear()
    _triton()
    _native()
    _libraries()


def launch(function: Callable) -> Callable:
    """A kernel that writes into its arguments; in a capture it is done again at every replay."""

    @functools.wraps(function)
    def launched(*args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with hidden(), torch.no_grad():
                return function(*args, **kwargs)

        result = run()
        if State.tape is not None:
            State.tape.append(run)
        return result

    return launched


def computed(function: Callable) -> Callable:
    """An operator of a library: its results are new, and on the device."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with hidden():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        results = run(*args, **kwargs)
        fresh = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        for x in fresh:
            place(x, True)
        if State.tape is not None:
            record(lambda: run(*args, **kwargs), fresh, set())
        return results

    return called


def _triton() -> None:
    """Every kernel is decorated for the interpreter; after that nothing tells of it any more."""
    from triton.runtime.interpreter import GridExecutor

    from hunyuan_fast import dispatch
    from tests.kit import interpreter

    interpreter.install()
    for op in dispatch.ops():
        dispatch.implementations(op)
    call = GridExecutor.__call__

    def interpret(*args: Any, **kwargs: Any) -> None:
        os.environ[INTERPRET] = "1"
        try:
            call(*args, **kwargs)
        finally:
            del os.environ[INTERPRET]

    GridExecutor.__call__ = launch(interpret)
    del os.environ[INTERPRET]


def _native() -> None:
    """Functions of ``_C`` that a build without CUDA lacks."""
    from hunyuan_fast import _C
    from tests.kit import hopper
    from tests.ops.hopper_emulator import RealSources, library
    from tests.ops.test_fp8_attention_sm90 import Emulator as Codes
    from tests.ops.test_norm_rope_attention_sm90 import RawEmulator
    from tests.ops.test_rope3d_attention_sm90_backward import Emulator as Gradients

    @functools.cache
    def made(kind: type) -> Any:
        return kind(library(hopper._folder())) if kind is RealSources else kind()

    for kind in (RawEmulator, Gradients, Codes, RealSources):
        for name in (each for each in dir(kind) if each.endswith("_hopper")):

            def call(*args: Any, kind: type = kind, name: str = name) -> Any:
                if kind is RealSources and getattr(args[0], "dtype", None) == torch.float16:
                    pytest.skip("the emulated convolution computes in bfloat16")
                # what is written back is not seen by autograd, as where a kernel writes
                plain = [x.data if isinstance(x, torch.Tensor) else x for x in args]
                return getattr(made(kind), name)(*plain)

            setattr(_C, name, launch(call))
    _C.fused_modulation_forward_cuda = launch(_modulation_forward)
    _C.fused_modulation_backward_cuda = launch(_modulation_backward)


def _modulation_forward(x: Any, shift: Any, scale: Any, eps: float, y: Any, stats: Any, *_: int):
    from hunyuan_fast.kernels.fused_modulation import reference

    _, modulated, found = reference.forward(x, shift, scale, eps)
    y.copy_(modulated)
    stats.copy_(found)


def _modulation_backward(*arguments: Any) -> None:
    from hunyuan_fast.kernels.fused_modulation import reference

    dy, x, scale, stats, partials, _, dx, dshift, dscale, *_ = arguments
    partials.fill_(0)
    found = reference.backward(dy, x, scale, stats)
    for result, value in zip((dx, dshift, dscale), found, strict=False):
        result.copy_(value)


def _libraries() -> None:
    from hunyuan_fast.kernels.frame_causal_attention import library_impl
    from tests.ops import rope3d_attention_libraries as stand_ins

    stand_ins.install(_Wrapping())
    for package in stand_ins._PACKAGES:
        module = sys.modules[package]
        for name, function in vars(module).copy().items():
            if inspect.isfunction(function):
                setattr(module, name, computed(function))
    stand_ins.forget()
    library_impl._cuda_forward = computed(stand_ins.efficient_forward)
    library_impl._cuda_backward = computed(stand_ins.efficient_backward)


class _Wrapping(pytest.MonkeyPatch):
    """Puts functions of libraries in their place as operators of the pretended device."""

    def setattr(self, target: Any, name: str, value: Any, raising: bool = True) -> None:  # type: ignore[override]
        wrapped = computed(value) if name.startswith(("_forward", "_backward")) else value
        setattr(target, name, wrapped)
