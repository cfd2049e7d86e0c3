"""Results as JSON files: what they hold, written whole, read strictly."""

import json
import types
import typing
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.kit.case import EVERY_PASS
from benchmarks.kit.discover import RESULTS, SCRATCH
from benchmarks.kit.machine import Machine, Source
from benchmarks.kit.statistics import Spread

VERSION = 1
# Function, case, dtype and pass of a measurement.
Key = tuple[str, str, str, str]


class RecordError(ValueError):
    """A file is no result; the message names the file, the place in it and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender in one measurement.

    kind: ours or peer.  answers: what a call gets when nothing is asked for by name
    speedup: time of the best peer over this one's, within each round
    of_floor: time of the floor over this one's, within each round
    difference: from the reference's result, relative, root mean square
    kept_mib: for calls with weights, what a call keeps for its backward pass, weights apart
    """

    name: str
    kind: str
    answers: bool
    ms: Spread
    rounds: int
    calls: int
    speedup: Spread | None
    of_floor: Spread
    peak_mib: float | None
    difference: float
    kept_mib: float | None = None  # files from before it was counted lack it


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One pass of one case. bound: memory or compute, whichever sets the floor.

    plain_flops: of the layers as they are written, where num_flops leaves out what nobody needs
    """

    case: str
    function: str
    dtype: str
    shape: dict[str, int]
    what: str
    num_bytes: int
    num_flops: int
    copy_gb_per_s: float
    matmul_tflop_per_s: float | None
    floor_ms: Spread
    bound: str
    best_peer: str | None
    timings: list[Timing]
    declined: dict[str, str]
    # Files from before these were counted lack them.
    conv3d_tflop_per_s: float | None = None
    plain_flops: int | None = None


@dataclass(frozen=True, kw_only=True)
class Alternation:
    """Time of both in turn over the sum of both alone; 1 when neither is in the other's way."""

    case: str
    dtype: str
    name: str
    kind: str
    companion: str
    ratio: Spread


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that one run says about one op, or one whole made of ops, on one device.

    tests: passed or skipped.  neighbours: part of the machine, 0 to 1, that other processes took
    """

    version: int
    op: str
    quick: bool
    tests: str
    neighbours: float | None
    machine: Machine
    source: Source
    measurements: list[Measurement]
    alternations: list[Alternation]


def path_of(result: Result) -> Path:
    """Where a result belongs: with the evidence, or with the runs that are none."""
    return place(result.op, result.machine, quick=result.quick, tests=result.tests)


def place(op: str, machine: Machine, *, quick: bool, tests: str) -> Path:
    """``path_of`` a result that is yet to be made."""
    folder = SCRATCH if quick or tests != "passed" else RESULTS
    return folder / machine.slug / f"{op}.json"


def save(result: Result, path: Path) -> None:
    """Write a result: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(dumps(result))
    draft.replace(path)


def at_hand(path: Path, machine: Machine, source: Source) -> Result | None:
    """The result in a file, if there is one and it is of that machine and code."""
    if not path.is_file():
        return None
    found = load(path)
    origin = found.machine, found.source.commit, found.source.clean
    return found if origin == (machine, source.commit, source.clean) else None


def joined(result: Result, path: Path) -> Result:
    """``result`` beside what the file at ``path`` has of other cases.

    Alone where there is no file, or one of another machine or of other code.
    """
    before = at_hand(path, result.machine, result.source)
    if before is None:
        return result
    new = keys(result)
    turns = {(a.case, a.dtype) for a in result.alternations}
    kept = [m for m in before.measurements if (m.function, m.case, m.dtype, m.what) not in new]
    other = [a for a in before.alternations if (a.case, a.dtype) not in turns]
    shares = [each.neighbours for each in (before, result) if each.neighbours is not None]
    commands = dict.fromkeys((*before.source.command.split("; "), result.source.command))
    return replace(
        result,
        neighbours=max(shares, default=None),
        source=replace(result.source, command="; ".join(commands)),
        measurements=[*kept, *result.measurements],
        alternations=[*other, *result.alternations],
    )


def keys(result: Result) -> set[Key]:
    """What a result has measured."""
    return {(m.function, m.case, m.dtype, m.what) for m in result.measurements}


def dumps(result: Result) -> str:
    """A result as text, five significant digits of every figure."""
    return json.dumps(_rounded(asdict(result)), indent=1) + "\n"


def load(path: Path) -> Result:
    """Read a result. Raises RecordError when the file is anything else."""
    return loads(path.read_text(), str(path))


def loads(text: str, name: str) -> Result:
    """Read a result from text; ``name`` is what errors call it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{name}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise RecordError(f"{name}: version must be {VERSION}; measure again")
    result: Result = _read(Result, data, f"{name}: result")
    _check(result, name)
    return result


def _check(result: Result, name: str) -> None:
    """What types cannot say."""
    if result.tests not in ("passed", "skipped"):
        raise RecordError(f"{name}: tests must be passed or skipped, got {result.tests!r}")
    if not result.measurements:
        raise RecordError(f"{name}: measurements must not be empty")
    for m in result.measurements:
        where = f"{name}: {m.case} {m.dtype} {m.what}"
        if m.what not in EVERY_PASS:
            raise RecordError(f"{where}: what must be one of {', '.join(EVERY_PASS)}")
        if sum(t.answers for t in m.timings) > 1:
            raise RecordError(f"{where}: one implementation answers, or none")
        if len({t.name for t in m.timings}) != len(m.timings):
            raise RecordError(f"{where}: the names in timings must differ")
        if m.best_peer is not None and m.best_peer not in {t.name for t in m.timings}:
            raise RecordError(f"{where}: best_peer {m.best_peer!r} was not timed")
        for t in m.timings:
            if t.kind not in ("ours", "peer") or (t.answers and t.kind != "ours"):
                raise RecordError(f"{where}: {t.name} must be ours or a peer, and ours to answer")
            for spread in (t.ms, t.of_floor, *([t.speedup] if t.speedup else [])):
                _check_spread(spread, f"{where}: {t.name}")
        if not any(t.kind == "ours" for t in m.timings):
            raise RecordError(f"{where}: one of the timings must be ours")
        _check_spread(m.floor_ms, f"{where}: floor_ms")
    for a in result.alternations:
        _check_spread(a.ratio, f"{name}: alternation of {a.name}")


def _check_spread(spread: Spread, where: str) -> None:
    if not 0 < spread.low <= spread.median <= spread.high:
        raise RecordError(f"{where}: expected 0 < low <= median <= high, got {spread}")


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value``, straight from JSON, as ``kind``: a dataclass, a container or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _read_fields(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        inner = next(each for each in arguments if each is not type(None))
        return _read(inner, value, where)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is not type(value):
        wanted = getattr(origin or kind, "__name__", kind)
        raise RecordError(f"{where} must be {wanted}, got {value!r}")
    return value


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{where} must be an object, got {value!r}")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if missing := sorted(needed - value.keys()):
        raise RecordError(f"{where} lacks {', '.join(missing)}")
    if foreign := sorted(value.keys() - names):
        raise RecordError(f"{where} has unknown {', '.join(foreign)}")
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in value})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
