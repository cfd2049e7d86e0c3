"""The emulated Hopper in the place of a room's native functions, for a machine without a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hunyuan_fast.kernels.fp8_attention import reference as fp8_reference
from tests.ops import hopper_emulator
from tests.ops.test_fp8_attention_sm90 import Emulator as Codes
from tests.ops.test_norm_rope_attention_sm90 import RawEmulator
from tests.ops.test_rope3d_attention_sm90 import Emulator as Forward
from tests.ops.test_rope3d_attention_sm90_backward import Emulator as Backward
from tests.sanitize_cases.case import Stand


@cache
def _convolution() -> hopper_emulator.RealSources:
    with tempfile.TemporaryDirectory() as folder:
        return hopper_emulator.RealSources(hopper_emulator.library(Path(folder)))


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


FORWARD = emulated(cache(Forward))
RAW = emulated(cache(RawEmulator))
BACKWARD = emulated(cache(Backward))
CODES = emulated(cache(Codes), _coder=lambda: fp8_reference)
CONVOLUTION = emulated(_convolution)
