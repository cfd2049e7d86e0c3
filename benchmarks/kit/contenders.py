"""Who is timed in a case: every implementation of ours that can answer, and the peers."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from benchmarks.kit.case import Call, Case, Unavailable
from hunyuan_fast import dispatch

OURS, PEER = "ours", "peer"
REFERENCE = "reference"


@dataclass(frozen=True)
class Contender:
    """A way to the result. answers: it is ours, and what a call gets without asking."""

    name: str
    kind: str
    call: Call
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    answers: bool = False


def contenders(
    op: str, case: Case, inputs: tuple[Tensor, ...]
) -> tuple[list[Contender], dict[str, str]]:
    """Those who can take part, ours first, and why the others cannot.

    An implementation that is not yet verified on this device is asked for by name.
    """
    found, declined = _ours(op, case, inputs)
    for peer in case.peers:
        try:
            found.append(Contender(peer.name, PEER, peer.build(), peer.context))
        except Unavailable as reason:
            declined[peer.name] = str(reason)
    return found, declined


def _ours(
    op: str, case: Case, inputs: tuple[Tensor, ...]
) -> tuple[list[Contender], dict[str, str]]:
    arguments = case.arguments(*inputs)
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
            found.append(Contender(name, OURS, case.call, context, name == answering))
        else:
            declined[name] = reason
    return found, declined
