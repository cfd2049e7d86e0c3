"""Measure the ops, and the blocks made of them, on this machine.

python -m benchmarks                    everything
python -m benchmarks fused_modulation   some; the tests of each run first and must pass
python -m benchmarks vae --only 720p    some cases; the others keep their places in the result
python -m benchmarks vae --missing      what the result at hand lacks, kept case by case
python -m benchmarks --quick            small shapes, a few rounds: whether it works, not how fast
python -m benchmarks --summary          render docs/performance.md, and the table of
                                        docs/gpu-notes.md, from the committed results
python -m benchmarks --commit-ranking   put what "hunyuan-fast bench attention --tune" measured here
                                        into kernels/*/ranking.json and VERIFIED_ON
python -m benchmarks --commit-verified  put into VERIFIED_ON what the results at hand have shown
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import torch

_CONSOLE = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a failure, 2 for bad usage."""
    options = _options(sys.argv[1:] if argv is None else argv)
    if options.commit_ranking:
        return _commit_ranking()
    if options.commit_verified:
        return _commit_verified()
    # What answers without asking is said of the committed ranking, and not of the user's own.
    os.environ["HUNYUAN_FAST_CACHE"] = os.devnull
    if options.summary:
        return _summarise()
    failed = [op for op in options.ops if not _benchmark(op, options)]
    if failed:
        _CONSOLE.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    from benchmarks.kit.discover import ops

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(ops())}")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few rounds")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="only cases with this in 'function name dtype'; joined with the result at hand if it "
        "is of the same code and machine",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="only what the result at hand, if it is of the same code and machine, does not have; "
        "saved after every pass of a case, so that a run may be ended and gone on with",
    )
    parser.add_argument(
        "--tested",
        type=Path,
        metavar="FILE",
        help="the state.json of scripts/gpu.py: tests are not run, its verdict counts",
    )
    parser.add_argument("--summary", action="store_true", help="render docs/performance.md")
    parser.add_argument(
        "--commit-ranking", action="store_true", help="write what was tuned here into the rooms"
    )
    parser.add_argument(
        "--commit-verified",
        action="store_true",
        help="let kernels answer where results, with their tests behind them, say they may",
    )
    parser.add_argument(
        "--skip-test",
        action="store_true",
        help="do not run the tests first; for work on a benchmark, the figures are no evidence",
    )
    options = parser.parse_args(argv)
    if unknown := [op for op in options.ops if op not in ops()]:
        parser.error(f"no benchmark for {', '.join(unknown)}; there is one for {', '.join(ops())}")
    options.command = " ".join(["python -m benchmarks", *argv])
    options.ops = list(dict.fromkeys(options.ops)) or list(ops())
    return options


def _summarise() -> int:
    from benchmarks.kit import predictions
    from benchmarks.kit.discover import ROOT
    from benchmarks.kit.record import RecordError
    from benchmarks.kit.summary import PAGE, committed_results, gpu_implementations, render

    try:
        results = committed_results()
        text = render(results, gpu_implementations())
        notes = predictions.page((ROOT / predictions.PAGE).read_text(), results)
    except (RuntimeError, RecordError) as error:
        _CONSOLE.print(f"[red]{error}[/]")
        return 1
    (ROOT / PAGE).write_text(text)
    (ROOT / predictions.PAGE).write_text(notes)
    _CONSOLE.print(f"wrote {PAGE} and {predictions.PAGE}")
    return 0


def _commit_ranking() -> int:
    from benchmarks.kit.discover import RESULTS
    from benchmarks.kit.rankings import NotCommitted, commit
    from benchmarks.kit.record import RecordError, load
    from hunyuan_fast import ranking

    try:
        results = [load(path) for path in sorted(RESULTS.glob("*/*.json"))]
        for line in commit(ranking.load(ranking.user_file()), results):
            _CONSOLE.print(line, markup=False, soft_wrap=True)
    except (NotCommitted, RecordError, ranking.RankingError) as error:
        _CONSOLE.print(f"[red]{error}[/]")
        return 1
    return 0


def _commit_verified() -> int:
    from benchmarks.kit import verified
    from benchmarks.kit.discover import RESULTS
    from benchmarks.kit.record import RecordError, load

    try:
        results = [load(path) for path in sorted(RESULTS.glob("*/*.json"))]
    except RecordError as error:
        _CONSOLE.print(f"[red]{error}[/]")
        return 1
    for line in verified.commit(results) or ["nothing to change"]:
        _CONSOLE.print(line, markup=False, soft_wrap=True)
    return 0


def _benchmark(op: str, options: argparse.Namespace) -> bool:
    """Test, measure, show and save one op; False, with the reason printed, when it fails."""
    from benchmarks.kit.gate import run_tests, seen_by

    start = time.monotonic()
    if not options.skip_test:
        _CONSOLE.print(f"[bold]{op}[/]: its tests first")
        verdict = seen_by(options.tested, op) if options.tested else run_tests(op)
        _CONSOLE.print(verdict.summary, markup=False)
        if not verdict.passed:
            _CONSOLE.print(f"[red]{op}: not measured, because its tests do not pass[/]")
            return False
    try:
        _measure(op, options)
    except Exception:  # the other ops are still to be measured
        traceback.print_exc()
        return False
    _CONSOLE.print(f"{op}: {time.monotonic() - start:.0f} s\n")
    return True


def _measure(op: str, options: argparse.Namespace) -> None:
    from benchmarks.kit import chart, machine, record, table
    from benchmarks.kit.discover import load
    from benchmarks.kit.run import run

    device = _device(options)
    tests = "skipped" if options.skip_test else "passed"
    here, source = machine.describe_machine(device), machine.describe_source(op, options.command)
    path = record.place(op, here, quick=options.quick, tests=tests)
    before = record.at_hand(path, here, source) if options.missing else None

    def keep(result: record.Result) -> None:
        if options.missing:
            record.save(record.joined(result, path), path)

    result = run(
        op,
        device,
        quick=options.quick,
        only=options.only,
        tests=tests,
        command=options.command,
        progress=lambda text: _CONSOLE.print(f"[dim]{text}[/]"),
        known=record.keys(before) if before else (),
        keep=keep,
    )
    if not result.measurements:
        _CONSOLE.print(f"{op}: {_short(path)} has every case")
        return
    table.show(result, _CONSOLE)
    if options.only or options.missing:
        result = record.joined(result, path)
    record.save(result, path)
    _CONSOLE.print(f"saved {_short(path)}")
    if chart.can_draw():
        chart.draw(result, path.with_suffix(".png"))
        _CONSOLE.print(f"saved {_short(path.with_suffix('.png'))}")
    else:
        _CONSOLE.print("no chart: matplotlib is missing (pip install 'hunyuan-fast[bench]')")
        return
    more = getattr(load(op), "more", None)
    for written in more(path, quick=options.quick) if more else ():
        _CONSOLE.print(f"saved {_short(written)}")


def _device(options: argparse.Namespace) -> "torch.device":
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch finds no CUDA device here")
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _short(path: Path) -> Path:
    from benchmarks.kit.discover import ROOT

    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
