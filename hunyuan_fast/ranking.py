"""Measured rankings: who is fastest in a class of calls, and where that is written down.

A room is ranked when it has ``shape_class.py``: ``shape_class(*args)`` is the class of a call, a
tuple of what decides, and ``neighbours(shape_class)`` are classes that its measurement also speaks
for. ``kernels/<op>/ranking.json`` is committed and holds for an architecture. What the user has
measured (``hunyuan-fast bench attention --tune``) holds for the very machine and software, and
comes first: its file is ``ranking.json`` in ``$HUNYUAN_FAST_CACHE``, else in ``hunyuan-fast`` of
``$XDG_CACHE_HOME`` or of ``~/.cache``.

In both a candidate has a time only if its results agreed with the reference in the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

VERSION = 1
# Where candidates come from beside torch and this package.
_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")

ShapeClass = tuple[Any, ...]


class RankingError(ValueError):
    """A file is no ranking; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """One measured call.

    shape: the call in words
    ms: medians of the candidates whose results agree
    error: distance from the truth of all that ran, in parts of what rounding may cause
    declined: why the others have no time
    """

    shape_class: ShapeClass
    shape: str
    ms: dict[str, float]
    error: dict[str, float]
    declined: dict[str, str]

    def ranked(self) -> list[str]:
        """The candidates that agree, the fastest first."""
        return sorted(self.ms, key=self.ms.__getitem__)


@dataclass(frozen=True)
class Section:
    """All that was measured of one op on one device with one set of software."""

    op: str
    arch: str
    device: str
    software: dict[str, str]
    date: str
    entries: list[Entry]

    def replaces(self, other: Section) -> bool:
        """Whether both are of one op and one device."""
        mine, others = ((s.op, s.arch, s.device) for s in (self, other))
        return mine == others


def is_ranked(op: str) -> bool:
    """Whether calls of the op have classes."""
    return find_spec(f"hunyuan_fast.kernels.{op}.shape_class") is not None


def user_file() -> Path:
    """Where the user's own ranking is, or would be."""
    if given := os.environ.get("HUNYUAN_FAST_CACHE"):
        return Path(given).expanduser() / "ranking.json"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "hunyuan-fast/ranking.json"


def committed_file(op: str) -> Path:
    """Where the committed ranking of an op is, or would be."""
    return Path(import_module(f"hunyuan_fast.kernels.{op}").__path__[0]) / "ranking.json"


def load(path: Path) -> list[Section]:
    """The sections of a file, none where there is no file. Raises RankingError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RankingError(f"{path} cannot be read: {error}") from error
    try:
        data = json.loads(text)
        if data["version"] != VERSION:
            raise ValueError(f"version must be {VERSION}, got {data['version']!r}")
        return [_read_section(each) for each in data["sections"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RankingError(f"{path} is no ranking: {type(error).__name__}: {error}") from error


def save(sections: Sequence[Section], path: Path) -> None:
    """Write a file: whole, or not at all. Raises OSError."""
    data = {"version": VERSION, "sections": [_plain(asdict(each)) for each in sections]}
    path.parent.mkdir(parents=True, exist_ok=True)
    number, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(draft).unlink()
        raise


def merged(new: Section, sections: Iterable[Section]) -> list[Section]:
    """``sections`` with ``new`` in place of its like.

    Classes that were measured before with the same software, and not anew, are kept.
    """
    kept: list[Entry] = []
    others = []
    for each in sections:
        if not new.replaces(each):
            others.append(each)
        elif each.software == new.software:
            fresh = {entry.shape_class for entry in new.entries}
            kept += [entry for entry in each.entries if entry.shape_class not in fresh]
    whole = Section(new.op, new.arch, new.device, new.software, new.date, [*kept, *new.entries])
    return [*others, whole]


def users(op: str, arch: str, device: torch.device) -> tuple[list[Entry], str | None]:
    """What the user has measured of an op here, and what there is to say about it, if anything.

    With nothing measured that holds, what there is to say is why not.
    """
    path = user_file()
    try:
        sections = load(path)
    except RankingError as error:
        return [], f"{error}; it is ignored: measure again with --tune, or remove it with --forget"
    name = device_name(device)
    here = [s for s in sections if (s.op, s.arch, s.device) == (op, arch, name)]
    if not here:
        return [], None
    now = software(op)
    for section in here:
        if section.software == now:
            count = len(section.entries)
            return section.entries, (
                f"{op} on {arch}: {count} kinds of calls measured here on {section.date} ({path})"
            )
    names = sorted(
        name for name in {*now, *here[0].software} if now.get(name) != here[0].software.get(name)
    )
    return [], (
        f"the ranking of {op} measured on {here[0].date} is ignored, because {', '.join(names)} "
        "changed since; measure again: hunyuan-fast bench attention --tune"
    )


def committed(op: str, arch: str) -> list[Entry]:
    """What a committed result says about an op on an architecture, the newest last."""
    sections = sorted(load(committed_file(op)), key=lambda section: section.date)
    return [e for s in sections if (s.op, s.arch) == (op, arch) for e in s.entries]


def by_class(op: str, entries: Iterable[Entry]) -> dict[ShapeClass, list[str]]:
    """Candidates of every class that was measured, or is near one that was, fastest first."""
    neighbours = import_module(f"hunyuan_fast.kernels.{op}.shape_class").neighbours
    ranked = {entry.shape_class: entry.ranked() for entry in entries}
    table = dict(ranked)
    # In step, so that a class goes to the nearest measurement.
    for nearest in zip(*(neighbours(each) for each in ranked), strict=True):
        for near, measured in zip(nearest, ranked, strict=True):
            table.setdefault(near, ranked[measured])
    return table


def device_name(device: torch.device) -> str:
    """What is measured on: a GPU, or a processor with the cores at hand."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def software(op: str) -> dict[str, str]:
    """All that a measurement of ``op`` depends on: when any of it changes, it is worth nothing."""
    from hunyuan_fast import __version__

    found = {
        "hunyuan-fast": __version__,
        "kernels": _fingerprint(op),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
    }
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    flash = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return found if flash is None else found | {"flash": flash}


def _fingerprint(op: str) -> str:
    """Of the code that is measured: of a checkout the version says little."""
    digest = hashlib.sha256()
    room = Path(import_module(f"hunyuan_fast.kernels.{op}").__path__[0])
    for path in sorted(room.rglob("*.py")):
        lines = path.read_bytes().splitlines()
        # Which may follow from the measurement.
        digest.update(b"\n".join(line for line in lines if not line.startswith(b"VERIFIED_ON")))
    native = find_spec("hunyuan_fast._C")
    if native is not None and native.origin:
        # Of megabytes, size and time of the last change must do.
        state = Path(native.origin).stat()
        digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """What JSON can hold of a section: five digits of a figure, dtypes by name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _read_section(data: dict[str, Any]) -> Section:
    entries = [_read_entry(each) for each in data["entries"]]
    for name in ("op", "arch", "device", "date"):
        _check(data[name], str, name)
    _check_values(data["software"], str, "software")
    return Section(**{f.name: data[f.name] for f in fields(Section)} | {"entries": entries})


def _read_entry(data: dict[str, Any]) -> Entry:
    _check(data["shape"], str, "shape")
    for name, kind in (("ms", float), ("error", float), ("declined", str)):
        _check_values(data[name], kind, name)
    if not all(0 < each < float("inf") for each in data["ms"].values()):
        raise ValueError(f"ms must be positive, got {data['ms']}")
    shape_class = tuple(_read_part(each) for each in data["shape_class"])
    return Entry(**{f.name: data[f.name] for f in fields(Entry)} | {"shape_class": shape_class})


def _read_part(part: Any) -> Any:
    """Part of a class: a word is the name of a dtype."""
    if not isinstance(part, str):
        _check(part, (bool, int), "part of a class")
        return part
    dtype = getattr(torch, part, None)
    _check(dtype, torch.dtype, f"{part!r} in a class")
    return dtype


def _check(value: Any, kind: Any, name: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")


def _check_values(value: Any, kind: type, name: str) -> None:
    _check(value, dict, name)
    for each in value.values():
        _check(each, (float, int) if kind is float else kind, f"a value of {name}")
