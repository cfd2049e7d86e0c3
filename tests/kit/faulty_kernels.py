"""A small Triton kernel, and the mistakes that only memory or the order of programs can show."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kit.inputs import with_layout
from tests.kit.interpreter import shuffled_programs
from tests.kit.memory import Fenced, far_apart, poisoned_memory
from tests.kit.numerics import assert_equal, assert_rounded_once


@triton.jit
def centre_rows_kernel(
    x_ptr, out_ptr, mean_ptr, stride_x, stride_out, width, FAULT: tl.constexpr, BLOCK: tl.constexpr
):
    """out = x - mean(x) and the mean of every row; one program per row."""
    row = tl.program_id(0)
    if FAULT != "32-bit offsets":
        row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x_ptrs = x_ptr + row * stride_x + columns
    if FAULT == "load without a mask":
        x = tl.load(x_ptrs)
    elif FAULT == "masked lanes undefined":
        x = tl.load(x_ptrs, mask=inside)
    else:
        x = tl.load(x_ptrs, mask=inside, other=0.0)
    if FAULT != "reduced in bf16":
        x = x.to(tl.float32)
    if FAULT == "double precision":
        x = x.to(tl.float64)
    mean = tl.sum(x, axis=0) / width
    if FAULT == "reads what another program wrote":
        mean = tl.load(mean_ptr + row - 1, mask=row > 0, other=0.0) * 0.0 + mean
    if FAULT == "adds to uninitialised memory":
        tl.atomic_add(mean_ptr + row, mean)
    elif FAULT != "a result not written":
        tl.store(mean_ptr + row, mean.to(tl.float32))
    if FAULT == "mask one too wide":
        inside = columns <= width
    if FAULT == "output stride ignored":
        stride_out = width
    out = (x - mean).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out + columns, out, mask=inside)


def _launch(x: Tensor, out: Tensor, fault: str | None) -> Tensor:
    rows, width = x.shape
    mean = torch.empty(rows, dtype=torch.float32)
    programs = {"grid one too small": rows - 1, "grid one too large": rows + 1}.get(fault, rows)
    centre_rows_kernel[(programs,)](
        x, out, mean, x.stride(0), out.stride(0), width, fault, triton.next_power_of_2(width)
    )
    return mean


def _inspect(x: Tensor, fault: str | None) -> None:
    """Run the kernel as the kit does, and raise when it shows a mistake."""
    with poisoned_memory():
        fenced = Fenced(x.shape, x.dtype, gap=3)
        mean = _launch(x, fenced.view, fault)
        fenced.check()
        again = Fenced(x.shape, x.dtype, gap=3)
        with shuffled_programs(seed=1):
            mean_again = _launch(x, again.view, fault)
    exact = x.double() - x.double().mean(-1, keepdim=True)
    single = x.float() - x.float().mean(-1, keepdim=True)
    assert_rounded_once(fenced.view, exact, single, name="out")
    assert_rounded_once(mean, x.double().mean(-1), x.float().mean(-1), name="mean")
    assert_equal(again.view, fenced.view, name="out in another order")
    assert_equal(mean_again, mean, name="mean in another order")


def _inspect_usual(fault: str | None, generator: torch.Generator) -> None:
    x = (torch.randn(3, 100, generator=generator) + 10).bfloat16()
    _inspect(with_layout(x, "sliced"), fault)


def _inspect_large(fault: str | None, generator: torch.Generator) -> None:
    x = far_apart((3, 100), (2**30 + 64, 1))
    _inspect(x.copy_(torch.randn(3, 100, generator=generator)), fault)


# The mistake, and the inspection that must notice it; None is no mistake.
INSPECTIONS: dict[str, Callable[[str | None, torch.Generator], None]] = {
    "load without a mask": _inspect_usual,
    "masked lanes undefined": _inspect_usual,
    "reduced in bf16": _inspect_usual,
    "reads what another program wrote": _inspect_usual,
    "adds to uninitialised memory": _inspect_usual,
    "a result not written": _inspect_usual,
    "mask one too wide": _inspect_usual,
    "output stride ignored": _inspect_usual,
    "grid one too small": _inspect_usual,
    "grid one too large": _inspect_usual,
    "32-bit offsets": _inspect_large,
}
