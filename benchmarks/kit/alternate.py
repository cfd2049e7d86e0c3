"""An op in turn with an operation of torch, against each of the two by itself.

Two pools of threads that wait for work by spinning take the cores from each other. A tight loop
over one op never shows it, and a model, which is nothing but turns, always does.
"""

import torch

from benchmarks.kit.case import FORWARD, Case
from benchmarks.kit.contenders import PEER, contenders
from benchmarks.kit.measure import Setting
from benchmarks.kit.pairing import Entry, paired_samples
from benchmarks.kit.record import Alternation
from benchmarks.kit.running import Bound, Inputs, context_of
from benchmarks.kit.statistics import paired_ratio

COMPANION = "gelu"


def alternate(op: str, case: Case, setting: Setting) -> list[Alternation]:
    """The ratio for the implementation that answers and, to compare, for the first peer."""
    inputs = Inputs(case, setting.device, setting.clock, setting.seed)
    found, _ = contenders(op, case, inputs.sets[0])
    chosen = [c for c in found if c.answers] + [c for c in found if c.kind == PEER][:1]
    x = inputs.sets[0][0].detach()

    def companion() -> None:
        torch.nn.functional.gelu(x, approximate="tanh")

    results = []
    for contender in chosen:
        run = Bound(contender.call, FORWARD, inputs)

        def both(run: Bound = run) -> None:
            run()
            companion()

        context = context_of(contender, FORWARD)
        entries = {
            "alone": Entry(run, context),
            COMPANION: Entry(companion, torch.no_grad),
            "both": Entry(both, context),
        }
        seconds = paired_samples(entries, setting.clock, setting.rounds).seconds
        apart = [sum(pair) for pair in zip(seconds["alone"], seconds[COMPANION], strict=True)]
        results.append(
            Alternation(
                case=case.name,
                dtype=case.dtype_name,
                name=contender.name,
                kind=contender.kind,
                companion=COMPANION,
                ratio=paired_ratio(seconds["both"], apart),
            )
        )
    return results
