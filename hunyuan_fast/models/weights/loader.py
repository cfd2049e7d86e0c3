"""Stored tensors into a model, one at a time and none left out.

The model is built without memory (on the meta device). Every name, shape and dtype is compared with
the headers of the files before the first weight gets memory; then each tensor is copied from its
mapped file into its place. Peak memory is the model and, at most, the pages of one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hunyuan_fast.distributed.cuts import Cut, Region
from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.layout import Layout
from hunyuan_fast.models.weights.locate import Located, recognise
from hunyuan_fast.models.weights.manifest import Manifest
from hunyuan_fast.models.weights.rule import Rule
from hunyuan_fast.models.weights.sources import SCALE_SUFFIX, Entry
from hunyuan_fast.modules.fp8 import FP8, dequantize_fp8, replace_linears


@dataclass(frozen=True)
class Slot:
    """Where one stored tensor belongs: rows [start, start + rows) of a native parameter."""

    native: str
    shape: tuple[int, ...]
    start: int | None = None
    swap_halves: bool = False


class _WithoutValues(TorchFunctionMode):
    """Leaves parameters as allocated: on the meta device initialisers only cost a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = func in (Tensor.uniform_, Tensor.normal_)
        if draws or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Models built in this context have shapes but neither memory nor values."""
    with torch.device("meta"), _WithoutValues():
        yield


def slots(model: nn.Module, rules: Sequence[Rule], layout: Layout) -> dict[str, Slot]:
    """Every name that the layout must have, with its place in the model."""
    state = model.state_dict()
    table: dict[str, Slot] = {}
    for rule in rules:
        shape = tuple(state[rule.native].shape)
        if layout != "diffusers":
            table[rule.native] = Slot(rule.native, shape)
            continue
        start = 0
        for name, rows in zip(rule.diffusers, rule.rows, strict=True):
            table[name] = Slot(rule.native, (rows, *shape[1:]), start, rule.swap_halves)
            start += rows
    return table


def load(
    model: nn.Module,
    located: Located,
    rules: Sequence[Rule],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    keep_fp8: bool,
    manifest: Manifest | None,
    cut: Callable[[], Mapping[str, Cut]] = dict,
) -> None:
    """Fill `model`, which is on the meta device, with the located weights.

    dtype: of the floating-point parameters, None for the stored one. fp8 weights stay fp8 with
    `keep_fp8`, else they are expanded (to bfloat16 where dtype is None). Every tensor is compared
    with its digest in `manifest`, if there is one. `cut()` is called when all is known to fit: it
    reduces the model to what this process holds, and says how it cut which parameters. Of those no
    more is read than is held, or with a manifest, whose digests are of whole tensors, kept.
    Raises CheckpointError for the first name, shape or digest that is wrong.
    """
    state = model.state_dict()
    assert {rule.native for rule in rules} == set(state), "the rules do not name every parameter"
    table = slots(model, rules, located.layout)
    entries = located.source.entries
    quantized = [
        name for name in entries if entries[name].dtype == FP8 and located.layout != "diffusers"
    ]
    scales = {name + SCALE_SUFFIX: Slot(name + SCALE_SUFFIX, ()) for name in quantized}
    table |= scales
    check_names(table, located)
    check_shapes(table, located)

    if keep_fp8:
        try:
            replace_linears(model, [name.removesuffix(".weight") for name in quantized])
        except ValueError as error:
            raise CheckpointError(f"{located.place}: fp8 weights, but {error}") from error
    table, regions = _held(table, cut())
    target = _Target(model, device)
    for name, value in located.source.tensors(regions if manifest is None else {}):
        entry, slot = entries[name], table[name]
        if manifest is not None:
            manifest.check_tensor(entry.file, name, value)
            value = regions[name].of(value) if name in regions else value
        kept = name in scales or (keep_fp8 and entry.dtype == FP8)
        target.put(slot, value, entry.dtype if kept else _dtype(entry, dtype))
    if not keep_fp8:
        target.expand(quantized)
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not left, f"no value was given to {left[0]}"


def _held(
    table: Mapping[str, Slot], cuts: Mapping[str, Cut]
) -> tuple[dict[str, Slot], dict[str, Region]]:
    """What this process holds of every stored tensor, with its place in the reduced model."""
    held, regions = dict(table), {}
    for name, slot in table.items():
        cut = cuts.get(slot.native)
        if cut is None:
            continue
        assert not slot.swap_halves, f"{slot.native} is cut, but stored in another order"
        regions[name], start = cut.of_rows(slot.start or 0, slot.shape[0])
        shape = list(slot.shape)
        shape[cut.dim] = sum(stop - first for first, stop in regions[name].ranges)
        held[name] = replace(slot, shape=tuple(shape), start=None if slot.start is None else start)
    return held, regions


def _dtype(entry: Entry, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is not None:
        return wanted
    return torch.bfloat16 if entry.dtype == FP8 else entry.dtype


class _Target:
    """The model that is being filled; a parameter gets memory when its first part arrives."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.values: dict[str, Tensor] = {}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def put(self, slot: Slot, value: Tensor, dtype: torch.dtype) -> None:
        whole = self.values.get(slot.native)
        if whole is None:
            shape = self.shapes.get(slot.native, slot.shape)
            whole = torch.empty(shape, dtype=dtype, device=self.device)
            self._set(slot.native, whole)
        part = whole if slot.start is None else whole.narrow(0, slot.start, slot.shape[0])
        if slot.swap_halves:
            value = torch.cat(value.chunk(2)[::-1])
        part.copy_(value)

    def expand(self, quantized: Sequence[str]) -> None:
        """Multiply weights that came as fp8, at this point cast only, by their scales."""
        for name in quantized:
            weight = self.values[name]
            weight.copy_(dequantize_fp8(weight, self.values[name + SCALE_SUFFIX]))

    def _set(self, name: str, value: Tensor) -> None:
        self.values[name] = value
        path, _, leaf = name.rpartition(".")
        module: Any = self.model.get_submodule(path)
        current = getattr(module, leaf, None)
        if isinstance(current, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=current.requires_grad))
        elif current is not None:
            setattr(module, leaf, value)


def check_names(table: dict[str, Slot], located: Located) -> None:
    """Raises CheckpointError for another model's weights, a missing key, an unexpected key."""
    entries = located.source.entries
    missing = [name for name in table if name not in entries]
    unexpected = [name for name in entries if name not in table]
    if len(missing) > len(table) / 2 and unexpected:
        kind = recognise(list(entries)) or "another model"
        raise CheckpointError(
            f"{entries[unexpected[0]].file}: these are the weights of {kind}: {missing[0]} is "
            f"missing, {unexpected[0]} is unexpected; name the right file or folder"
        )
    if missing:
        raise CheckpointError(
            f"{located.place}: {missing[0]} is missing ({len(missing)} of {len(table)} tensors "
            f"are); {_by_config(located)}"
        )
    if unexpected:
        raise CheckpointError(
            f"{entries[unexpected[0]].file}: {unexpected[0]} is unexpected "
            f"({len(unexpected)} such tensors); {_by_config(located)}"
        )


def check_shapes(table: dict[str, Slot], located: Located) -> None:
    """Raises CheckpointError for the first tensor whose shape is not what the config says."""
    for name, slot in table.items():
        entry = located.source.entries[name]
        if entry.shape != slot.shape:
            raise CheckpointError(
                f"{entry.file}: {name} has shape {entry.shape}, expected {slot.shape}; "
                f"{_by_config(located)}"
            )
        if math.prod(entry.shape) == 0:
            raise CheckpointError(f"{entry.file}: {name} is empty, shape {entry.shape}")
        if entry.dtype == FP8 and located.layout == "diffusers":
            raise CheckpointError(
                f"{entry.file}: {name} is fp8, which the diffusers layout has no scale for; "
                "use the official fp8 file with its map, or the bf16 weights"
            )


def _by_config(located: Located) -> str:
    config: Path | None = located.config
    if config is None:
        return "the file is incomplete or of another model, fetch it again"
    return f"weights and {config} do not belong together, or a file is old; fetch both again"
