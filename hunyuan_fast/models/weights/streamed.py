"""A safetensors file written tensor by tensor, so that no more than one has to be in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from typing_extensions import Self

Form = tuple[torch.dtype, tuple[int, ...]]

_METADATA = {"format": "pt"}


class TensorsFile:
    """The bytes of safetensors' ``save_file``: the header first, then tensors in any order.

    forms: dtype and shape of every tensor, by name. Raises OSError where it cannot be written.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        header, self._places = _header_of(forms)
        self._forms, self._name = forms, path.name
        self._file = path.open("wb")
        self._write(0, header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a contiguous CPU tensor into its place."""
        dtype, shape = self._forms[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
        self._write(self._places.pop(name), tensor.detach().reshape(-1).view(torch.uint8).numpy())

    def _write(self, place: int, values: Any) -> None:
        try:
            self._file.seek(place)
            self._file.write(values)
        except OSError as error:
            raise self._explained(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()  # which writes what is left
        except OSError as failure:
            if kind is None:
                raise self._explained(failure) from failure
        assert kind is not None or not self._places, f"{self._name} lacks {sorted(self._places)}"

    def _explained(self, error: OSError) -> OSError:
        return OSError(f"{self._name} cannot be written: {error}")


def _header_of(forms: Mapping[str, Form]) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where in it each tensor begins."""
    kinds = _kinds(tuple({dtype: None for dtype, _ in forms.values()}))
    ordered = sorted(forms, key=lambda name: (list(kinds).index(forms[name][0]), name))
    entries: dict[str, Any] = {"__metadata__": _METADATA}
    starts, at = {}, 0
    for name in ordered:
        dtype, shape = forms[name]
        starts[name], stop = at, at + prod(shape) * dtype.itemsize
        place = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        entries[name] = place
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _kinds(dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, str]:
    """What the library calls dtypes, in the order in which it stores them: it is asked."""
    one_each = {str(i): torch.zeros(1, dtype=dtype) for i, dtype in enumerate(dtypes)}
    stored = save(one_each)
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    inside = sorted(header, key=lambda name: header[name]["data_offsets"])
    return {dtypes[int(name)]: header[name]["dtype"] for name in inside}
