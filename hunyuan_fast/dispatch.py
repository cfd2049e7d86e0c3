"""Which implementation answers a call.

A room ``kernels/<op>/`` holds its implementations as modules, each with ``forward``, ``backward``,
``supports(...)`` (``None`` for yes, or the reason why not) and ``VERIFIED_ON`` (the architectures
where a committed result shows that it is right and faster than the next one). The first that
objects to nothing answers, unless it knows better: ``prefers(arch, ...)``, which a module may have,
names another one for calls that a committed result has shown to be faster there, or None. The other
answers if it is verified and can. ``HUNYUAN_FAST_IMPL=triton_impl`` or ``with use("triton_impl"):``
names one, verified or not, preferred or not: it answers, or the call fails. Of several names,
joined by commas, the first that can answers.

A room may have more libraries behind its library_impl, modules of ``kernels/<op>/libraries/`` with
the same names in them: ``library_impl.<module>``. And it may be ranked (``hunyuan_fast.ranking``):
in classes of calls that were measured, order and preferences give way to the fastest that is
verified, here by the user's own measurement or by ``VERIFIED_ON``.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from types import ModuleType

import torch
from torch import Tensor

from hunyuan_fast import ranking

# In order of preference; library_impl stands for the kernels that torch itself brings.
IMPLEMENTATIONS = ("cuda_impl", "triton_impl", "cpu_impl", "library_impl", "reference")
_LIBRARY = "library_impl."

# One for the process and no context variable: autograd runs backward in threads of its own, which
# would not see the caller's context. The key is the op, or None for every op.
_named: dict[str | None, str] = {}
if os.environ.get("HUNYUAN_FAST_IMPL"):
    _named[None] = os.environ["HUNYUAN_FAST_IMPL"]

_log = logging.getLogger("hunyuan_fast")


@contextmanager
def use(name: str, op: str | None = None) -> Iterator[None]:
    """Name the implementation that must answer, for one op or for every op that has it.

    name: one, or several joined by commas: the first of them that can answers.
    It holds for the whole process until the block ends. Raises ValueError for an unknown name;
    a call that the named implementation cannot answer raises RuntimeError with its reason.
    """
    _check_name(name)
    for each in name.split(",") if op is not None else ():
        known = [*_candidates(op), *_libraries(op)]
        if each not in known:
            raise ValueError(f"op {op!r} has no {each!r}; it has {', '.join(known)}")
    before = _named.copy()
    _named[op] = name
    try:
        yield
    finally:
        _named.clear()
        _named.update(before)


def select(op: str, *args: object) -> ModuleType:
    """The implementation of ``op`` that answers a call of its ``forward`` with ``args``."""
    named = _named.get(op) or _named.get(None)
    if named is not None:
        return _select_named(op, named, args)
    return _select_verified(op, args)


def explain(op: str, *args: object) -> dict[str, str | None]:
    """Why each implementation of ``op`` would not answer this call by itself; None if it would."""
    arch = _arch(args)
    reasons = dict(_candidates(op))
    for name, impl in implementations(op).items():
        reasons[name] = impl.supports(*args)
        if reasons[name] is None and not {arch, "*"} & impl.VERIFIED_ON:
            reasons[name] = f"unverified on {arch}: no committed result"
    answer = _first_ranked(op, arch, args)
    first = next((name for name, reason in reasons.items() if reason is None), None)
    if answer is None and first is not None:
        answer = _preferred(op, implementations(op)[first], arch, args)
    if answer is not None:
        chosen = name_of(answer)
        if chosen.startswith(_LIBRARY):  # it takes the place of the one that stands for them all
            reasons = {
                new: why
                for name, why in reasons.items()
                for new in ((chosen, name) if name == _LIBRARY[:-1] else (name,))
            }
        for name in takewhile(lambda name: name != chosen, reasons):
            reasons[name] = reasons[name] or f"{chosen} is faster for this call"
        reasons[chosen] = None
    return reasons


def name_of(impl: ModuleType) -> str:
    """What :func:`use` calls an implementation."""
    *_, parent, name = impl.__name__.split(".")
    return f"{_LIBRARY}{name}" if parent == "libraries" else name


@cache
def implementations(op: str) -> dict[str, ModuleType]:
    """The implementations of ``op`` that can be loaded here, best first. Raises ValueError."""
    usable = [name for name, missing in _candidates(op).items() if missing is None]
    return {name: import_module(f"hunyuan_fast.kernels.{op}.{name}") for name in usable}


@cache
def choices(op: str) -> dict[str, ModuleType]:
    """All that a ranking of ``op`` may choose from: :func:`implementations` and its libraries.

    Libraries stand in the place of library_impl, which is one or the other of them.
    """
    found: dict[str, ModuleType] = {}
    for name, impl in implementations(op).items():
        libraries = _libraries(op) if name == _LIBRARY[:-1] else {}
        found |= libraries or {name: impl}
    return found


@cache
def ops() -> tuple[str, ...]:
    """The names of all ops, in alphabetical order."""
    rooms = pkgutil.iter_modules(import_module("hunyuan_fast.kernels").__path__)
    return tuple(sorted(room.name for room in rooms if room.ispkg and room.name != "common"))


@dataclass(frozen=True)
class Report:
    """Who answers each op on each device. ``reasons[op, arch]`` is what ``explain`` says.

    notes: on rankings that were measured here
    """

    reasons: dict[tuple[str, str], dict[str, str | None]]
    notes: tuple[str, ...] = ()

    def answering(self, op: str, arch: str) -> str:
        """The name of the implementation that answers ``op`` on ``arch``."""
        return next(name for name, why in self.reasons[op, arch].items() if why is None)

    def __str__(self) -> str:
        width = 2 + max([12, *(len(self.answering(*each)) for each in self.reasons)])
        lines = [f"{'op':<24}{'on':<8}{'answers':<{width}}faster ones do not because"]
        for (op, arch), reasons in self.reasons.items():
            answer = self.answering(op, arch)
            head = f"{op:<24}{arch:<8}{answer:<{width}}"
            for name, why in reasons.items():
                if name == answer:
                    break
                lines.append(f"{head}{name}: {why}")
                head = " " * len(head)
            if head.strip():
                lines.append(head.rstrip())
        lines += dict.fromkeys(self.notes)
        return "\n".join(lines)


def report() -> Report:
    """Who answers each op here for a typical call, on the CPU and on each kind of GPU present."""
    reasons, notes = {}, []
    for op in ops():
        example = import_module(f"hunyuan_fast.kernels.{op}.reference").example
        for arch, device in _devices().items():
            reasons[op, arch] = explain(op, *example(device))
            if ranking.is_ranked(op):
                notes.append(ranking.users(op, arch, device)[1])
    return Report(reasons, tuple(note for note in notes if note is not None))


def _select_verified(op: str, args: tuple[object, ...]) -> ModuleType:
    arch = _arch(args)
    ranked = _first_ranked(op, arch, args)
    if ranked is not None:
        return ranked
    for impl, verified_on in _verified(op):
        if (arch in verified_on or "*" in verified_on) and impl.supports(*args) is None:
            return _preferred(op, impl, arch, args)
    raise RuntimeError(f"no implementation of {op} answers this call: {explain(op, *args)}")


def _first_ranked(op: str, arch: str, args: tuple[object, ...]) -> ModuleType | None:
    """The fastest measured one that can answer; None where nothing was measured."""
    ranked = _ranked(op, arch)
    if ranked is not None:
        classify, table = ranked
        for impl in table.get(classify(*args), ()):
            if impl.supports(*args) is None:
                return impl
    return None


@cache
def _ranked(
    op: str, arch: str
) -> tuple[Callable[..., ranking.ShapeClass], dict[ranking.ShapeClass, list[ModuleType]]] | None:
    """How calls of ``op`` are classed, and who may answer each class, the fastest first."""
    loaded = choices(op)
    if not ranking.is_ranked(op):
        return None
    device = _devices().get(arch)
    mine, note = ranking.users(op, arch, device) if device is not None else ([], None)
    if note is not None and not mine:
        _log.warning("%s", note)
    verified = [name for name, impl in loaded.items() if {arch, "*"} & impl.VERIFIED_ON]
    committed = ranking.by_class(op, ranking.committed(op, arch))
    names = {key: [n for n in found if n in verified] for key, found in committed.items()}
    names |= ranking.by_class(op, mine)
    table = {key: [loaded[n] for n in found if n in loaded] for key, found in names.items()}
    if not any(table.values()):
        return None
    return import_module(f"hunyuan_fast.kernels.{op}.shape_class").shape_class, table


def _devices() -> dict[str, torch.device]:
    """The CPU, and the first GPU of every architecture."""
    found = {"cpu": torch.device("cpu")}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.setdefault(_cuda_arch(index), torch.device("cuda", index))
    return found


def forget_rankings() -> None:
    """Read the files of rankings anew when the next call chooses."""
    _ranked.cache_clear()


def _preferred(op: str, impl: ModuleType, arch: str, args: tuple[object, ...]) -> ModuleType:
    """What ``impl``, which would answer, leaves the call to: itself as a rule."""
    prefers = getattr(impl, "prefers", None)
    other = implementations(op).get(prefers(arch, *args)) if prefers else None
    if other is None or not {arch, "*"} & other.VERIFIED_ON or other.supports(*args) is not None:
        return impl
    return other


def _select_named(op: str, named: str, args: tuple[object, ...]) -> ModuleType:
    _check_name(named)
    candidates = _candidates(op)
    libraries = _libraries(op)
    names = [name for name in named.split(",") if name in candidates or name in libraries]
    if not names:  # named for every op, and this room never had it
        return _select_verified(op, args)
    reasons = []
    for name in names:
        reason = candidates.get(name)
        if reason is None:
            impl = libraries.get(name) or implementations(op)[name]
            reason = impl.supports(*args)
            if reason is None:
                return impl
        reasons.append(f"{name} was asked for by name and cannot answer {op}: {reason}")
    raise RuntimeError("; ".join(reasons))


def _check_name(name: str) -> None:
    for each in name.split(","):
        if each not in IMPLEMENTATIONS and not any(each in _libraries(op) for op in ops()):
            choice = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementation must be one of {choice}, got {name!r}")


@cache
def _verified(op: str) -> tuple[tuple[ModuleType, frozenset[str]], ...]:
    _say_what_is_missing()
    return tuple((impl, impl.VERIFIED_ON) for impl in implementations(op).values())


@cache
def _say_what_is_missing() -> None:
    """Cached, so that it is said once: when the first op chooses, not on import."""
    if missing := _native_missing():
        _log.warning("%s; ops run on the other implementations, which may be slower", missing)


@cache
def _candidates(op: str) -> dict[str, str | None]:
    """The implementations whose file is in the room, and what each lacks to be loaded."""
    room = f"hunyuan_fast.kernels.{op}"
    if op not in ops():
        raise ValueError(f"op must be one of {', '.join(ops())}, got {op!r}")
    return {name: _missing(name) for name in IMPLEMENTATIONS if find_spec(f"{room}.{name}")}


@cache
def _libraries(op: str) -> dict[str, ModuleType]:
    """The libraries of a room by the names that :func:`use` knows them by; most rooms have none."""
    package = f"hunyuan_fast.kernels.{op}.libraries"
    if find_spec(package) is None:
        return {}
    found = pkgutil.iter_modules(import_module(package).__path__)
    return {f"{_LIBRARY}{each.name}": import_module(f"{package}.{each.name}") for each in found}


def _missing(name: str) -> str | None:
    if name == "triton_impl" and find_spec("triton") is None:
        return "triton is not installed"
    if name == "triton_impl" and not _triton_runs():
        return "Triton finds no GPU, and its interpreter (TRITON_INTERPRET=1) is off"
    if name in ("cuda_impl", "cpu_impl") and (missing := _native_missing()):
        return missing
    if name == "cuda_impl" and not import_module("hunyuan_fast._C").has_cuda:
        return "hunyuan_fast._C was built without CUDA: no nvcc was found"
    return None


def _triton_runs() -> bool:
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _native_missing() -> str | None:
    try:
        import_module("hunyuan_fast._C")
    except ImportError as error:
        if error.name == "hunyuan_fast._C" and isinstance(error, ModuleNotFoundError):
            return "hunyuan_fast._C is not built (install again with a C++17 compiler)"
        return f"hunyuan_fast._C does not load ({error})"
    return None


def _arch(args: tuple[object, ...]) -> str:
    """The architecture of the first tensor."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arch_of(arg.device)
    raise TypeError("a call must have at least one tensor")


def arch_of(device: torch.device) -> str:
    """What rankings and ``VERIFIED_ON`` call a device: ``cpu``, ``sm_90``, ..."""
    return _cuda_arch(device.index) if device.type == "cuda" else device.type


@cache
def _cuda_arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
