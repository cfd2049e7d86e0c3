"""The most memory that a call on the CPU has at a time, from the system's own record of it.

What was freed before is given back, the record of the highest resident size of this process is set
to the present, and the call is made. What the record has grown by is the peak. Pages of files are
left out: those of libraries come and go with the system's needs.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def growth(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident size of this process grows, at most, during ``run``.

    None where the system does not tell; the call is made all the same.
    """
    gc.collect()
    # What glibc keeps of freed memory would be used again without being seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not _RESET.exists():
        run()
        return None
    trim(0)
    _RESET.write_text("5")
    own, files = _bytes("RssAnon"), _bytes("RssFile")
    run()
    return max(0, _bytes("VmHWM") - own - max(files, _bytes("RssFile")))


def _bytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
