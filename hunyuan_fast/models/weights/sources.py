"""Weight files opened lazily: names, shapes and dtypes at once, values file by file."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_fast.distributed.cuts import Region
from hunyuan_fast.models.weights.errors import CheckpointError

SCALE_SUFFIX = "_scale"
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 50_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_WRAPPERS = ("module", "state_dict")


@dataclass(frozen=True)
class Entry:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(Protocol):
    """Weight files whose headers have been read.

    entries: every tensor by its name in the file.
    tensors(regions): name and value of each, on the CPU, in the order of the files; of those that
    regions names, the region alone. A value may be a view of a mapped file, so it is to be copied
    before the next one is asked for.
    """

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def tensors(self, regions: Mapping[str, Region]) -> Iterator[tuple[str, Tensor]]: ...


def open_source(files: Sequence[Path]) -> Source:
    """The source in `files`, shards of safetensors or one torch file; the content decides which.

    Raises CheckpointError for a file that is missing, truncated, damaged or of another kind, and
    for a pickle that holds anything but tensors.
    """
    kinds = [_kind(file) for file in files]
    if kinds == ["torch"]:
        return TorchSource(files[0])
    if "torch" in kinds:
        other = files[kinds.index("torch")]
        raise CheckpointError(f"{other}: a torch file among the shards of a safetensors model")
    return SafetensorsSource(files)


def _kind(file: Path) -> str:
    """ "safetensors" or "torch", by the first bytes of the file."""
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; download or copy it there") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if len(head) < 9:
        raise CheckpointError(f"{file}: truncated, only {len(head)} bytes; fetch the file again")
    if head[8:9] != b"{" and (head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"):
        return "torch"
    if head[8:9] != b"{":
        raise CheckpointError(
            f"{file}: not a checkpoint; expected safetensors or a torch file, "
            f"got a file that begins with {head[:8]!r}"
        )
    header = int.from_bytes(head[:8], "little")
    if header > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: its header claims {header} bytes, more than the {MAX_HEADER_BYTES} that any "
            "model needs; the file is damaged or hostile"
        )
    return "safetensors"


class SafetensorsSource:
    """One or several safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _safetensors_entries(file).items():
                if name in self.entries:
                    raise CheckpointError(
                        f"{file}: {name} is also in {self.entries[name].file.name}; "
                        "the folder mixes shards of two models"
                    )
                self.entries[name] = entry

    def tensors(self, regions: Mapping[str, Region]) -> Iterator[tuple[str, Tensor]]:
        for file in dict.fromkeys(entry.file for entry in self.entries.values()):
            names = [name for name, entry in self.entries.items() if entry.file == file]
            try:
                with safe_open(file, framework="pt", device="cpu") as opened:
                    for name in names:
                        if name in regions:
                            yield name, _read_region(opened.get_slice(name), regions[name])
                        else:
                            yield name, opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: {error}; fetch the file again") from error


def _read_region(stored: Any, region: Region) -> Tensor:
    """The bytes of a region from its file, and no others."""
    before = (slice(None),) * region.dim
    pieces = [stored[before + (slice(start, stop),)] for start, stop in region.ranges]
    return torch.cat(pieces, dim=region.dim)


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = opened.keys()
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"{file}: {len(names)} tensors, more than any model has")
            for name in names:
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file}: {name} has dtype {part.get_dtype()}, expected one of "
                        f"{', '.join(_DTYPES)}"
                    )
                entries[name] = Entry(file, tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: truncated or damaged ({error}); fetch the file again"
        ) from error
    return entries


class TorchSource:
    """One file of `torch.save`, read with `weights_only=True` and mapped rather than loaded.

    The tensors are the dict itself or lie under its key "module" or "state_dict". Where names begin
    with "vae." only those count, without the prefix. With fp8 weights the scales come from the map
    beside the file (`<stem>_map.pt`) and appear as `<module>.weight_scale`.
    """

    def __init__(self, file: Path) -> None:
        data = _load_torch(file)
        wrapper = next((key for key in _WRAPPERS if isinstance(data.get(key), dict)), None)
        state = data[wrapper] if wrapper else data
        if any(str(name).startswith("vae.") for name in state):
            state = {
                name.removeprefix("vae."): value
                for name, value in state.items()
                if str(name).startswith("vae.")
            }
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{file}: {name!r} is a {type(value).__name__}, expected a tensor; "
                    f"the weights must be the dict itself or lie under one of {_WRAPPERS}"
                )
            if value.dtype not in _DTYPES.values():
                raise CheckpointError(f"{file}: {name} has dtype {value.dtype}, expected floats")
        self._state: dict[str, Tensor] = dict(state)
        self.entries: dict[str, Entry] = {
            name: Entry(file, tuple(value.shape), value.dtype) for name, value in state.items()
        }
        if any(value.dtype == torch.float8_e4m3fn for value in self._state.values()):
            self._add_scales(file.with_name(f"{file.stem}_map.pt"), file)

    def _add_scales(self, map_file: Path, weights: Path) -> None:
        if not map_file.is_file():
            raise CheckpointError(
                f"{map_file}: no such file; the fp8 weights {weights.name} cannot be used without "
                "their scales, put the map beside them"
            )
        for module, scale in _load_torch(map_file).items():
            weight = f"{module}.weight"
            if weight not in self._state:
                raise CheckpointError(f"{map_file}: {module} has a scale but no {weight}")
            self._state[weight + SCALE_SUFFIX] = _scale(scale, f"{map_file}: {module}")
            self.entries[weight + SCALE_SUFFIX] = Entry(map_file, (), torch.bfloat16)
        for name, value in list(self._state.items()):
            if value.dtype == torch.float8_e4m3fn and name + SCALE_SUFFIX not in self._state:
                raise CheckpointError(
                    f"{map_file}: {name.removesuffix('.weight')} has fp8 weights but no scale"
                )

    def tensors(self, regions: Mapping[str, Region]) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._state.items():
            yield name, regions[name].of(value) if name in regions else value


def _scale(scale: Any, where: str) -> Tensor:
    """One finite scale as the bfloat16 that the released code casts it to before use."""
    if isinstance(scale, (int, float, Tensor)):
        value = torch.as_tensor(scale).reshape(-1)
        if value.numel() == 1 and bool(value.isfinite()):
            return value[0].to(torch.bfloat16)
    raise CheckpointError(f"{where} must be one finite scale, got {scale!r}")


def _load_torch(file: Path) -> dict[Any, Any]:
    zipped = zipfile.is_zipfile(file)
    if zipped:
        _check_archive(file)
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, the pickle holds more than tensors and could run code, or it is "
            f"damaged ({_reason(error)}); ask for safetensors, or fetch the file again"
        ) from error
    # A damaged pickle may fail in any way that the unpickler's instructions can.
    except Exception as error:
        raise CheckpointError(
            f"{file}: truncated or damaged ({type(error).__name__}: {_reason(error)}); "
            "fetch the file again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a dict of tensors, got {type(data).__name__}")
    return data


def _reason(error: Exception) -> str:
    """The line of torch's message that tells the fault, without its advice to trust the file."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.startswith(advice)), "no reason")


def _check_archive(file: Path) -> None:
    """Refuse archives that would unpack to more than the file holds."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error})") from error
    if len(records) > MAX_TENSORS:
        raise CheckpointError(f"{file}: {len(records)} records, more than any model has")
    for record in records:
        pickled = record.filename.endswith("data.pkl")
        if record.compress_type != zipfile.ZIP_STORED or (
            pickled and record.file_size > MAX_HEADER_BYTES
        ):
            raise CheckpointError(
                f"{file}: record {record.filename} is compressed or too large for a torch file; "
                "the file is damaged or hostile"
            )
