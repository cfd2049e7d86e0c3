"""Who is timed in a case: all of ours that can answer, and the peers."""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.kit.case import Call, Case, Entrant, Unavailable
from hunyuan_fast import dispatch

OURS, PEER = "ours", "peer"
# Whose lack is told, too.
_NATIVE = ("cuda_impl", "triton_impl", "cpu_impl")
REFERENCE = "reference"


@dataclass(frozen=True)
class Contender:
    """A way to the result.

    answers: it is ours, and what a call gets without asking
    may_fail: it may turn out only when called that it cannot take part
    same: its result is compared with those of the others
    """

    name: str
    kind: str
    call: Call
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    answers: bool = False
    may_fail: bool = False
    same: bool = True


def contenders(
    op: str, case: Case, inputs: tuple[Tensor, ...]
) -> tuple[list[Contender], dict[str, str]]:
    """Those who can take part, ours first, and why the others cannot.

    An implementation that is not yet verified on this device is asked for by name.
    """
    if case.arguments is None:
        found, declined = _built(OURS, case.ours)
        asked = found[0].context is not nullcontext
        found[0] = replace(found[0], answers=not asked, may_fail=len(found) > 1)
    else:
        found, declined = _implementations(op, case.call, case.arguments(*inputs))
    peers, without = _built(PEER, case.peers)
    return [*found, *peers], {**declined, **without}


def first_line(failure: Exception) -> str:
    """What to say of a contender that failed."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"[:200]


def _built(kind: str, entrants: Iterable[Entrant]) -> tuple[list[Contender], dict[str, str]]:
    found, declined = [], {}
    for each in entrants:
        try:
            call = each.build()
        except Unavailable as reason:
            declined[each.name] = str(reason)
            continue
        except Exception as failure:  # others' packages, and compilers, may raise anything
            if kind == OURS:
                raise
            declined[each.name] = first_line(failure)
            continue
        made = Contender(each.name, kind, call, each.context, may_fail=True, same=each.same)
        found.append(made)
    return found, declined


def _implementations(
    op: str, call: Call, arguments: tuple[object, ...]
) -> tuple[list[Contender], dict[str, str]]:
    reasons = dispatch.explain(op, *arguments)
    loaded = dispatch.choices(op)
    answering = _who(op, next(n for n, reason in reasons.items() if reason is None), arguments)
    reasons = {name: why for name, why in reasons.items() if name in _NATIVE} | {
        name: impl.supports(*arguments) for name, impl in loaded.items()
    }
    found, declined = [], {}
    for name, reason in reasons.items():
        if name == "triton_impl" and os.environ.get("TRITON_INTERPRET") == "1":
            reason = "Triton's interpreter (TRITON_INTERPRET=1) is for tests, not for timing"
        if reason is not None:
            declined[name] = reason
            continue
        answers = name == answering
        # A library is ours where it is our choice, and else one that ours are compared with.
        kind = PEER if "." in name and not answers else OURS
        context = partial(dispatch.use, name, op)
        found.append(Contender(name, kind, call, context, answers, may_fail=kind == PEER))
    return sorted(found, key=lambda each: each.kind == PEER), declined


def _who(op: str, name: str, arguments: tuple[object, ...]) -> str:
    """Of an implementation that stands for several libraries, the one that takes this call."""
    impl = dispatch.implementations(op).get(name)
    kernel = getattr(impl, "kernel", None)
    return name if kernel is None else dispatch.name_of(kernel(*arguments))


def by_name(
    device: torch.device, **chosen: str
) -> Callable[[], AbstractContextManager[object]] | None:
    """What asks for the best kernel of every op; None where they all answer by themselves.

    A call that the best one cannot answer goes to the next.
    chosen: for some ops the implementation to ask for instead, and then never None on a GPU.
    """
    if device.type != "cuda":
        return None
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    found = {op: dispatch.implementations(op) for op in dispatch.ops()}
    best = (next(iter(each.values())) for each in found.values())
    if not chosen and all({arch, "*"} & module.VERIFIED_ON for module in best):
        return None
    names = {op: ",".join(each) for op, each in found.items()} | chosen

    def context() -> ExitStack:
        with ExitStack() as stack:
            for op, name in names.items():
                stack.enter_context(dispatch.use(name, op))
            return stack.pop_all()

    return context
