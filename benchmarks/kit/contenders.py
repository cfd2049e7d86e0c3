"""Who is timed in a case: all of ours that can answer, and the peers."""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from benchmarks.kit.case import Call, Case, Entrant, Unavailable
from hunyuan_fast import dispatch

OURS, PEER = "ours", "peer"
REFERENCE = "reference"


@dataclass(frozen=True)
class Contender:
    """A way to the result.

    answers: it is ours, and what a call gets without asking
    may_fail: it may turn out only when called that it cannot take part
    """

    name: str
    kind: str
    call: Call
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    answers: bool = False
    may_fail: bool = False


def contenders(
    op: str, case: Case, inputs: tuple[Tensor, ...]
) -> tuple[list[Contender], dict[str, str]]:
    """Those who can take part, ours first, and why the others cannot.

    An implementation that is not yet verified on this device is asked for by name.
    """
    if case.arguments is None:
        found, declined = _built(OURS, case.ours)
        found[0] = replace(found[0], answers=True, may_fail=False)
    else:
        found, declined = _implementations(op, case.call, case.arguments(*inputs))
    peers, without = _built(PEER, case.peers)
    return [*found, *peers], {**declined, **without}


def _built(kind: str, entrants: Iterable[Entrant]) -> tuple[list[Contender], dict[str, str]]:
    found, declined = [], {}
    for each in entrants:
        try:
            found.append(Contender(each.name, kind, each.build(), each.context, may_fail=True))
        except Unavailable as reason:
            declined[each.name] = str(reason)
    return found, declined


def _implementations(
    op: str, call: Call, arguments: tuple[object, ...]
) -> tuple[list[Contender], dict[str, str]]:
    reasons = dispatch.explain(op, *arguments)
    answering = next(name for name, reason in reasons.items() if reason is None)
    loaded = dispatch.implementations(op)
    found, declined = [], {}
    for name, reason in reasons.items():
        if name in loaded:
            reason = loaded[name].supports(*arguments)
        if name == "triton_impl" and os.environ.get("TRITON_INTERPRET") == "1":
            reason = "Triton's interpreter (TRITON_INTERPRET=1) is for tests, not for timing"
        if reason is None:
            context = partial(dispatch.use, name, op)
            found.append(Contender(name, OURS, call, context, name == answering))
        else:
            declined[name] = reason
    return found, declined
