"""`from_pretrained` and `save_pretrained` for every model of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import Self

from hunyuan_fast.distributed.cuts import Cut
from hunyuan_fast.models.weights.configs import check_depth, read_config
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.loader import load, without_memory
from hunyuan_fast.models.weights.locate import locate
from hunyuan_fast.models.weights.manifest import Manifest
from hunyuan_fast.models.weights.writer import save

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Pretrained:
    """Mixin of a model that is built from `config_class` and keeps its config as `config`.

    component: the model's folder in a pipeline. The names of its parameters in other layouts are
    the functions `rules(config)`, `config_to_diffusers(config)` and `config_from_diffusers(dict)`
    of the module `checkpoint` that lies beside the model's.
    cuts: how the parameters are cut that other processes hold parts of, by name.
    """

    config_class: ClassVar[type]
    component: ClassVar[str]
    config: Any
    cuts: Mapping[str, Cut] = MappingProxyType({})

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model that `config` describes, with fresh weights."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)})

    @classmethod
    def checkpoint_names(cls) -> ModuleType:
        """The module with the model's names and settings in other layouts."""
        return import_module(f"{cls.__module__.rpartition('.')[0]}.checkpoint")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        config: Any = None,
        keep_fp8: bool = True,
        verify: bool = True,
        share: Callable[[Self], object] | None = None,
    ) -> Self:
        """The stored model, in evaluation mode.

        path_or_repo: a pipeline folder, this model's folder, one weights file, a repo id of the
            Hugging Face Hub or "nano"; native, diffusers or official layout, recognised by content.
        dtype: of the parameters; None keeps the stored one.
        config: for files that have none beside them; else the stored one is used.
        keep_fp8: fp8 weights stay fp8 and are expanded at each call; else they are expanded now.
        verify: compare the digests of the native layout.
        share: reduces the model, before it has memory, to what this process holds of it, and sets
            its `cuts`; the rest is not loaded (nor read, with verify=False).
        Raises CheckpointError (a ValueError) naming the file and the first wrong key; ValueError
        for a device or dtype that cannot be used.
        """
        place = _check_device(device)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES} or None, got {dtype!r}")
        located = locate(path_or_repo, subfolder, cls.component)
        manifest = None
        if located.layout == "native" and verify:
            manifest = Manifest(located.folder)
            manifest.check_files()
        names = cls.checkpoint_names()
        if config is None:
            config = read_config(located, cls.config_class, cls.component, names)
        check_depth(config, located)
        try:
            with without_memory():
                model = cls.from_config(config)
            rules = names.rules(config)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{located.config or located.place}: no model can be built from these settings "
                f"({str(error).splitlines()[0]}); fetch the file again"
            ) from error
        assert isinstance(model, nn.Module)

        def cut() -> Mapping[str, Cut]:
            if share is not None:
                share(model)
            return model.cuts

        load(
            model,
            located,
            rules,
            device=place,
            dtype=dtype,
            keep_fp8=keep_fp8,
            manifest=manifest,
            cut=cut,
        )
        model.eval()
        return model

    def save_pretrained(
        self,
        path: str | Path,
        *,
        layout: Literal["native", "diffusers"] = "native",
        max_shard_bytes: int = 2 * 2**30,
    ) -> None:
        """Write the model into the folder `path`, which appears whole or not at all.

        An earlier save of the same model there is replaced; anything else is left alone.
        Raises CheckpointError when `path` is taken, OSError when it cannot be written.
        """
        if layout not in ("native", "diffusers"):
            raise ValueError(f'layout must be "native" or "diffusers", got {layout!r}')
        if self.cuts:
            raise ValueError(
                "the model must hold all of its weights to be saved, got one that shares them "
                "with other processes; use hunyuan_fast.models.dit.resharding.save_pretrained"
            )
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        assert isinstance(self, nn.Module)
        save(
            self,
            path,
            config=self.config,
            component=self.component,
            names=self.checkpoint_names(),
            layout=layout,
            max_shard_bytes=max_shard_bytes,
        )


def _check_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be like 'cpu' or 'cuda:0', got {device!r}") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not there: {torch.cuda.device_count()} CUDA devices; use 'cpu'"
        )
    return place
