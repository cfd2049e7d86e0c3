"""What the native module is built from, as one number: ``hunyuan_fast._C.sources`` holds it.

Whoever finds a module can so tell whether it is of the sources at hand. Standard library only:
setup.py comes here, and what runs before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """Of the names and contents of ``csrc/`` and ``CMakeLists.txt``; flags and compilers apart."""
    files = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    total = hashlib.sha256()
    for path in sorted([root / "CMakeLists.txt", *files]):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
