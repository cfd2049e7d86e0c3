"""What every kernel is predicted to do on Hopper, beside what was measured: ``docs/gpu-notes.md``.

The floor of a case is that of its benchmark, at two ceilings that are assumed until they are
measured. A prediction is a share of that floor, with its reason; it is made before the kernel runs
and not changed afterwards. A new version of a kernel gets a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.kit.case import BACKWARD, FORWARD, TRAINING, Case
from benchmarks.kit.discover import load
from benchmarks.kit.record import Result
from benchmarks.kit.table import number

PAGE = Path("docs/gpu-notes.md")
ARCH = "sm_90"
# Assumed: a copy counts bytes read and written, a product is dense and of bf16.
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.0e12, 780e12
NOT_RUN = "not run"
_BEGIN, _END = "<!-- begin: python -m benchmarks --summary -->", "<!-- end -->"


@dataclass(frozen=True)
class Prediction:
    """of_floor: by pass, the time of the floor over that of the kernel.

    version: which state of the kernel; the commit stands in the result that measures it
    then: what an earlier version has measured, by "case, pass", with the commit; only the latest
        version is looked up in results, which are of the kernel as it is now
    """

    op: str
    impl: str
    of_floor: Mapping[str, float]
    why: str
    version: int = 1
    then: Mapping[str, str] = field(default_factory=dict)


def _of(forward: float, training: float | None = None, backward: float | None = None) -> dict:
    shares = {FORWARD: forward, BACKWARD: backward, TRAINING: training}
    return {what: share for what, share in shares.items() if share is not None}


PREDICTIONS = (
    Prediction(
        *("rope3d_attention", "cuda_impl", _of(0.80, 0.70, 0.67)),
        "forward: products and exponentials overlap, as in FlashAttention 3 (620 to 648 TFLOP/s); "
        "backward: shared memory, 3488 clocks a step for 3200 of products, and one block in step "
        "with the others for the order of the sums",
    ),
    Prediction(
        *("rope3d_attention", "triton_impl", _of(0.58, 0.42, 0.38)),
        "forward: no two warpgroups in turn (Triton's own tutorial: 395 to 477 TFLOP/s); "
        "backward: 7 products where 5 would do",
    ),
    Prediction(
        *("fp8_attention", "cuda_impl", _of(1.15)),
        "exponentials take as long as products, 1024 clocks a tile each; the floor is that of bf16",
    ),
    Prediction(
        *("fp8_attention", "triton_impl", _of(0.70)),
        "64 keys a step, nothing of the two overlaps across warps",
    ),
    Prediction(
        *("sliding_tile_attention", "triton_impl", _of(0.45, 0.28)),
        "rows are gathered with pointers, 560 instructions a step beside the products; backward as "
        "in dense attention, with 64 x 32 tiles",
    ),
    Prediction(
        *("frame_causal_attention", "triton_impl", _of(0.33, 0.15)),
        "at D = 512 scores are made twice, 3/2 of the products; backward has 16 or 32 rows a tile",
    ),
    Prediction(
        *("causal_conv3d", "cuda_impl", _of(0.55)),
        "48 KiB a step through the second-level cache: 470 TFLOP/s where it gives 5.5 TB/s",
    ),
    Prediction(
        *("causal_conv3d", "triton_impl", _of(0.45, 0.35)),
        "the same traffic, and addresses of every tap computed by the warps that multiply",
    ),
    Prediction(
        *("fused_modulation", "triton_impl", _of(0.90, 0.80)),
        "one pass over memory; backward has 128 registers a thread, 16 warps a multiprocessor",
    ),
    Prediction(
        *("fused_modulation", "cuda_impl", _of(0.92, 0.85)),
        "as in Triton, with no idle lanes at E = 3072",
    ),
    Prediction(
        *("gelu_tanh", "triton_impl", _of(0.95, 0.95)),
        "nothing but 16-byte loads and stores",
    ),
    Prediction(
        *("qk_norm_rope", "triton_impl", _of(0.85, 0.75)),
        "three streams of reads and tables from the cache; backward has 155 registers",
    ),
    Prediction(
        *("group_norm_silu", "triton_impl", _of(0.62, 0.60)),
        "the map is read twice forward, map and gradient twice backward, past the cache",
    ),
    Prediction(
        *("ring_attention", "triton_impl", _of(0.85, 0.80)),
        "one pass; log-sum-exps are few",
    ),
)

# The cases that stand for an op: any of these words is in "function case".
SHOWN = {
    "rope3d_attention": ("256p-65f", "720p-129f"),
    "causal_conv3d": (
        *("720p-decode-512-512ch-180x320", "720p-decode-256-256ch-360x640"),
        *("720p-decode-128-128ch-720x1280", "trained-256ch"),
    ),
    "sliding_tile_attention": ("720p-129f 3x3x3", "256p-65f 1x1x1"),
    "group_norm_silu": ("256p-17f-fine",),
    "frame_causal_attention": ("256p", "720p"),
    "fp8_attention": ("256p", "720p"),
}
_LONG = ("720p-129f",)


def cases_on_hopper(op: str) -> list[Case]:
    """The cases that a benchmark has on a GPU, described without one."""
    with _meta_instead():
        return load(op).cases(torch.device("cuda"), quick=False)


def floor_ms(num_bytes: int, num_flops: int) -> float:
    """The longer of the copy and the product, at the assumed ceilings."""
    return 1e3 * max(num_bytes / BYTES_PER_SECOND, num_flops / FLOPS_PER_SECOND)


def render(results: Mapping[str, Result], predictions: Sequence[Prediction] = PREDICTIONS) -> str:
    """The table: a line for every version, case and pass. The same results give the same text."""
    lines = [
        "| kernel | version | case, pass | GB | TFLOP | floor ms | predicted ms | measured ms |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    cases = {op: list(_shown(op)) for op in dict.fromkeys(p.op for p in predictions)}
    for p in predictions:
        for case in cases[p.op]:
            if not _answers(p, case):
                continue
            for what in (each for each in case.work if each in p.of_floor):
                work = case.work[what]
                floor = floor_ms(work.num_bytes, work.num_flops)
                name = f"{case.function} {case.name}, {what}"
                latest = p.version == max(
                    q.version for q in predictions if (q.op, q.impl) == (p.op, p.impl)
                )
                known = _measured(results, p, case, what) if latest else p.then.get(name, NOT_RUN)
                cells = (
                    *(f"`{p.op}.{p.impl}`", str(p.version), name),
                    *(number(work.num_bytes / 1e9), number(work.num_flops / 1e12)),
                    *(number(floor), number(floor / p.of_floor[what])),
                    known,
                )
                lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- `{p.op}.{p.impl}`, version {p.version}: {p.why}." for p in predictions]
    return "\n".join([*lines, "", "Why so much of the floor:", "", *reasons])


def page(text: str, results: Mapping[str, Result]) -> str:
    """The page of notes, its table made anew. Raises ValueError where it has no place for one."""
    before, begin, rest = text.partition(f"{_BEGIN}\n")
    _, end, after = rest.partition(f"{_END}\n")
    if not begin or not end:
        raise ValueError(f"{PAGE} must hold the lines {_BEGIN} and {_END}")
    return f"{before}{begin}\n{render(results)}\n\n{end}{after}"


def _shown(op: str) -> Iterator[Case]:
    wanted = SHOWN.get(op, _LONG)
    for case in cases_on_hopper(op):
        name = f"{case.function} {case.name}"
        plain = case.dtype is torch.bfloat16 and not name.endswith(("-padded", "-shortcut"))
        # attention behind a rotation of its own is what nobody does any more
        rotated = case.function == "rope3d_attention"
        if plain and not rotated and any(words in name for words in wanted):
            yield case


def _answers(p: Prediction, case: Case) -> bool:
    """Whether the implementation has a kernel for the case at all."""
    return not (
        (p.op, p.impl) == ("fused_modulation", "cuda_impl")
        and case.function != "layer_norm_modulate"
    )


def _measured(results: Mapping[str, Result], p: Prediction, case: Case, what: str) -> str:
    """The median of the latest committed result, and the commit that it measured."""
    key = case.function, case.name, case.dtype_name, what
    for result in results.values():
        if result.op != p.op or result.machine.arch != ARCH:
            continue
        for m in result.measurements:
            timing = next((t for t in m.timings if t.name == p.impl), None)
            if (m.function, m.case, m.dtype, m.what) == key and timing is not None:
                return f"{number(timing.ms.median)} ({(result.source.commit or 'unknown')[:10]})"
    return NOT_RUN


class _Meta(TorchFunctionMode):
    """What is made for a GPU is made without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        device = given.get("device")
        if device is not None and torch.device(device).type == "cuda":
            given["device"] = "meta"
        return func(*args, **given)


@contextmanager
def _meta_instead() -> Iterator[None]:
    hopper = mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with _Meta(), hopper:
        yield
