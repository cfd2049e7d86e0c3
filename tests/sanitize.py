"""Run one small call of every kernel for a GPU, in one process, for compute-sanitizer to watch.

python -m tests.sanitize --list                          what there is
python -m tests.sanitize                                 all that this machine can run
python -m tests.sanitize rope3d_attention                a room
python -m tests.sanitize causal_conv3d/cuda_impl         an implementation, or whatever begins so

Every result is compared with the reference. Without a GPU Triton's kernels are interpreted, and
those for Hopper run on the emulated one. Leaves with 1 when a result is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch

# before any kernel is imported, which decides at decoration whether it is interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HUNYUAN_FAST_CACHE"] = os.devnull

from tests.sanitize_cases import attention, convolution, rows
from tests.sanitize_cases.case import Case

CASES: dict[str, Case] = {
    case.name: case for case in (*rows.CASES, *convolution.CASES, *attention.CASES)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what names of cases begin with")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if not chosen([name])]:
        parser.error(f"no case begins with {', '.join(unknown)}; see --list")
    if options.list:
        for case in chosen(options.names):
            print(case.name + (f"  ({reason})" if (reason := case.missing()) else ""))
        return 0
    return run(chosen(options.names))


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases whose names are, or begin with, one of these; all without any."""
    starts = tuple(f"{name}/" for name in names)
    return [
        case
        for case in CASES.values()
        if not names or case.name in names or case.name.startswith(starts)
    ]


def run(cases: Sequence[Case]) -> int:
    """Run cases and say how each ended; 1 when one of them is wrong."""
    if not torch.cuda.is_available():
        from tests.kit.interpreter import install

        install()
    wrong = ran = 0
    for case in cases:
        if reason := case.missing():
            print(f"{case.name}: {reason}", flush=True)
            continue
        # the name first: what a tool reports below it is of this case
        print(f"{case.name} ...", flush=True)
        start = time.monotonic()
        try:
            case.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
        ran += 1
        print(f"    {time.monotonic() - start:.1f} s", flush=True)
    print(f"{ran} cases, {wrong} wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
