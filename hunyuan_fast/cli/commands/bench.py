"""Measure who computes attention fastest here, and have the fastest answer from then on (--tune).

A table shows all that can compute it, and how exact they are. With --tune it is kept: from then on
the fastest that agrees answers calls like these. --forget undoes that.

Candidates are our kernels and those of libraries that are installed. Each must agree with the
reference, in the same run, before it is timed. What is kept holds for this device and these
versions of the software, and is ignored when they change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hunyuan_fast.cli.errors import CommandError, UsageError
from hunyuan_fast.cli.parsing import Float, OptionalText, parse
from hunyuan_fast.cli.placement import read_place

if TYPE_CHECKING:
    import torch

    from hunyuan_fast.kernels.rope3d_attention.problems import Problem
    from hunyuan_fast.ranking import Entry

_SUBJECTS = {"attention": "rope3d_attention"}


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast bench attention`` takes."""

    tune: bool = False
    """Keep the ranking: from now on the fastest that agrees answers calls like these."""
    forget: bool = False
    """Remove every ranking that was kept, and measure nothing."""
    backward: bool = False
    """Measure forward and backward together as well."""
    dtype: OptionalText = None
    """float32, bfloat16 or float16. Default: bfloat16, and on a CPU float32 too."""
    shapes: tuple[str, ...] = ()
    """BxLxNxD, or BxLxNxD:n,n with the valid tokens of every sample. Default: short to long."""
    without: tuple[str, ...] = ()
    """Candidates to leave out, by name."""
    seconds: Float = 3.0
    """How long to time each shape."""
    device: OptionalText = None
    """cpu, cuda or cuda:N. Default: a GPU if there is one."""
    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Choose the subject by the first word, measure it, print, and keep what is to be kept."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: hunyuan-fast bench {{{','.join(_SUBJECTS)}}} [OPTIONS]\n\n{__doc__}")
        print("options: --debug, and those that hunyuan-fast bench attention --help tells")
        return
    if words[0] not in _SUBJECTS:
        raise UsageError(f"no benchmark {words[0]!r}; expected one of {', '.join(_SUBJECTS)}")
    options = parse(Options, words[1:], f"bench {words[0]}", __doc__)
    if options.forget:
        _forget()
        return
    if not 0 < options.seconds <= 600:
        raise UsageError(f"--seconds must be above 0 and at most 600, got {options.seconds:g}")
    _measure(_SUBJECTS[words[0]], options)


def _forget() -> None:
    from hunyuan_fast import ranking

    path = ranking.user_file()
    if path.exists():
        path.unlink()
        print(f"removed {path}")
    else:
        print(f"nothing is kept: there is no {path}")


def _measure(op: str, options: Options) -> None:
    from hunyuan_fast import dispatch, tuning
    from hunyuan_fast.cli.stages import Stages, console

    device, dtype = read_place(options.device, options.dtype)
    _check_candidates(op, options.without)
    todo = _problems(device, dtype, options)
    arch = dispatch.arch_of(device)
    entries = []
    with Stages(str(device), console(stderr=True)) as stages:
        for problem in todo:
            entry = tuning.measure(
                op,
                problem,
                device,
                seconds=options.seconds,
                without=options.without,
                progress=stages,
            )
            entries.append(entry)
            print(_table(problem, entry), flush=True)
    print(_reasons(entries))
    if options.tune:
        _keep(lambda: tuning.keep(op, arch, device, entries))


def _check_candidates(op: str, names: Sequence[str]) -> None:
    from hunyuan_fast import dispatch

    known = dispatch.choices(op)
    for name in names:
        if name not in known:
            raise UsageError(f"--without must be one of {', '.join(known)}, got {name!r}")


def _problems(
    device: "torch.device", dtype: "torch.dtype | None", options: Options
) -> "list[Problem]":
    import torch

    from hunyuan_fast.kernels.rope3d_attention.problems import Problem, problems, read_shape

    dtypes = [dtype] if dtype else [torch.bfloat16]
    if dtype is None and device.type == "cpu":
        dtypes.insert(0, torch.float32)
    if not options.shapes:
        return problems(device, dtypes, training=options.backward)
    try:
        shapes = [read_shape(text) for text in options.shapes]
    except ValueError as error:
        raise UsageError(f"--shapes: {error}") from error
    passes = (False, True) if options.backward else (False,)
    return [Problem(each, *shape, what) for each in dtypes for shape in shapes for what in passes]


def _table(problem: "Problem", entry: "Entry") -> str:
    """Who agrees, the fastest first."""
    lines = [str(problem), _row("", "ms", "TFLOP/s", "of the best", "error")]
    best = min(entry.ms.values(), default=0.0)
    for name in entry.ranked():
        ms, error = entry.ms[name], entry.error[name]
        rate = problem.flops / ms / 1e9
        lines.append(_row(name, f"{ms:.4g}", f"{rate:.3g}", f"{best / ms:.0%}", f"{error:.2f}"))
    return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    return f"  {name:<28}" + "".join(f"{cell:>12}" for cell in cells)


def _reasons(entries: "Sequence[Entry]") -> str:
    """Who did not take part, and why; one line for each reason."""
    lines = ["error: distance from the truth, in parts of what rounding may cause"]
    seen: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for name, reason in entry.declined.items():
            seen.setdefault((name, reason), []).append(entry.shape)
    for (name, reason), shapes in seen.items():
        where = "" if len(shapes) == len(entries) else f" ({'; '.join(shapes)})"
        lines.append(f"{name}: {reason}{where}")
    return "\n".join(lines)


def _keep(write: Callable[[], Any]) -> None:
    from hunyuan_fast import ranking

    path = ranking.user_file()
    try:
        write()
    except OSError as error:
        raise CommandError(
            f"{path} cannot be written ({error.strerror}); name another folder in "
            "HUNYUAN_FAST_CACHE"
        ) from error
    print(f"kept in {path}; hunyuan-fast doctor tells who answers, --forget undoes it")
