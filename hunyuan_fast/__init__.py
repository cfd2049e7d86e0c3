"""HunyuanVideo written anew: models, kernels, sampling and training.

Importing this package imports torch at most; everything else is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hunyuan_fast.dispatch import report, use
    from hunyuan_fast.pipelines import HunyuanVideoPipeline

__version__ = "0.1.0"

__all__ = ["HunyuanVideoPipeline", "__version__", "report", "use"]

_HOME = {
    "HunyuanVideoPipeline": "hunyuan_fast.pipelines",
    "report": "hunyuan_fast.dispatch",
    "use": "hunyuan_fast.dispatch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hunyuan_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
