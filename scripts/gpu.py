"""Build, probe, test, sanitize, measure and tune on a machine with a GPU, in stages.

python scripts/gpu.py                              everything
python scripts/gpu.py --stages build,probe,test    some stages
python scripts/gpu.py --only causal_conv3d         one room; "wholes" is what is no room
python scripts/gpu.py --minutes 9 --resume         what is left or red, for nine minutes

It uses the Python that it is started with. Logs and state.json go to --out; --resume goes on from
there, and does again what was green where its sources have changed. It leaves with 0 when all that
was asked for is green or cannot be had on this machine, 1 when something is red, and 3 when the
time was up before all was done.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_run import machine as machines  # noqa: E402
from gpu_run.running import Runner  # noqa: E402
from gpu_run.state import State, pack, table  # noqa: E402
from gpu_run.steps import STAGES, WHOLES, Step, plan, rooms  # noqa: E402

LEFT = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _options(argv)
    try:
        machine = machines.describe()
    except machines.NoGpu as error:
        print(f"this needs a machine with an NVIDIA GPU and its driver: {error}")
        return 2
    folder: Path = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    every = plan(ROOT, machine, folder, keep_going=options.keep_going)
    steps = [step for step in every if _chosen(step, options)]
    state = State(folder, machine.gpu)
    if options.list:
        print(table(steps, state))
        return 0
    print(f"{machine.gpu}, sm_{machine.arch}, {machine.cores} cores, {machine.python}")
    print(f"{len(steps)} steps; logs and state in {folder}")
    runner = Runner(
        ROOT,
        folder,
        state,
        seconds=options.minutes * 60,
        resume=options.resume,
        say=lambda text: print(text, flush=True),
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        runner.run(steps)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(f"\n{table(steps, state)}\n")
    if options.pack is not None:
        count = pack(options.pack, folder, ROOT, state.started)
        print(f"{count} files in {options.pack}")
    return _status(steps, state)


def _status(steps: Sequence[Step], state: State) -> int:
    ends = [(step.required, state.get(step.name)) for step in steps]
    if red := [end for required, end in ends if required and end and end.verdict.bad]:
        print(f"{len(red)} red")
        return 1
    if left := [end for _, end in ends if end is None or end.verdict.open]:
        print(f"{len(left)} left: go on with --resume")
        return LEFT
    return 0


def _chosen(step: Step, options: argparse.Namespace) -> bool:
    if step.stage not in options.stages:
        return False
    return step.room is None or not options.only or step.room in options.only


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", type=_stages, default=STAGES, help=f"default: {','.join(STAGES)}"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROOM", help="these rooms")
    parser.add_argument(
        "--minutes", type=_minutes, default=float("inf"), help="begin nothing after, end what runs"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/gpu", metavar="DIR", help="default: runs/gpu"
    )
    parser.add_argument("--resume", action="store_true", help="do not repeat what is green")
    parser.add_argument(
        "--keep-going", action="store_true", help="a room's tests go on after the first red one"
    )
    parser.add_argument("--list", action="store_true", help="show the steps and what is known")
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="FILE",
        help="at the end: logs, state and changed files, .tar.gz",
    )
    options = parser.parse_args(argv)
    known = [*rooms(ROOT), WHOLES]
    if unknown := [room for room in options.only if room not in known]:
        parser.error(f"no room {', '.join(unknown)}; there are {', '.join(known)}")
    return options


def _stages(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(
            f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}"
        )
    return tuple(names)


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"minutes must be a positive number, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
