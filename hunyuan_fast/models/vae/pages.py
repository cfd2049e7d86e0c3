"""Keeping the memory of a process close to that of its tensors, where glibc allocates it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
_LARGE = 1 << 18
# Where glibc's own choice, which grows with what is freed, comes to rest.
_GROWN = 1 << 25


@contextmanager
def own_pages() -> Iterator[None]:
    """Meanwhile every map of some size has pages of its own, which go back when it is freed.

    Otherwise maps of up to 32 MiB lie in one heap, where what is freed between two others stays
    resident: half as much again as all the tensors hold has been seen. New pages take a per cent
    of the time of the convolution that fills them.
    """
    glibc = _glibc()
    if glibc is None:
        yield
        return
    glibc.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        glibc.mallopt(_MMAP_THRESHOLD, _GROWN)


def give_back() -> None:
    """Return pages between freed tensors to the system; they lie within the allocator's heap."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of the process, if it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
