"""The models: diffusion transformer, variational autoencoder, text encoders; imported on demand."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
    from hunyuan_fast.models.vae.model import HunyuanVideoVAE

__all__ = ["HunyuanVideoTransformer", "HunyuanVideoVAE"]

_HOMES = {"HunyuanVideoTransformer": "dit", "HunyuanVideoVAE": "vae"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}.model"), name)


def __dir__() -> list[str]:
    return __all__
