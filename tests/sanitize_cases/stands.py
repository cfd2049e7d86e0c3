"""The emulated Hopper in the place of a room's native functions, for a machine without a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.sanitize_cases.case import Stand


@cache
def _emulator(test: str, name: str = "Emulator") -> object:
    """That of a room's own tests, which a GPU has no need to load."""
    return getattr(import_module(f"tests.ops.{test}"), name)()


@cache
def _convolution() -> object:
    module = import_module("tests.ops.hopper_emulator")
    with tempfile.TemporaryDirectory() as folder:
        return module.RealSources(module.library(Path(folder)))


def _coder() -> ModuleType:
    return import_module("hunyuan_fast.kernels.fp8_attention.reference")


# Names of native functions that were called in this process.
called: set[str] = set()


class _Watched:
    """An emulator, of which is noted what is asked for."""

    def __init__(self, native: object) -> None:
        self._native = native

    def __getattr__(self, name: str) -> object:
        called.add(name)
        return getattr(self._native, name)


def emulated(native: Callable[[], object], **attributes: object) -> Stand:
    """The emulator as ``_C``, and no device to go to."""

    @contextmanager
    def stand(module: ModuleType) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_C", _Watched(native()))
            for name, value in attributes.items():
                patch.setattr(module, name, value)
            patch.setattr(torch.cuda, "device", lambda _: nullcontext())
            stream = SimpleNamespace(cuda_stream=0)
            patch.setattr(torch.cuda, "current_stream", lambda _: stream)
            yield

    return stand


FORWARD = emulated(lambda: _emulator("test_rope3d_attention_sm90"))
RAW = emulated(lambda: _emulator("test_norm_rope_attention_sm90", "RawEmulator"))
BACKWARD = emulated(lambda: _emulator("test_rope3d_attention_sm90_backward"))
CODES = emulated(lambda: _emulator("test_fp8_attention_sm90"), _coder=_coder)
CONVOLUTION = emulated(_convolution)
