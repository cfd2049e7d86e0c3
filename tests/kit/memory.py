"""Memory that shows mistakes: poisoned, fenced, or far too large to index with 32 bits."""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor made in the block is full of NaN, or of the largest integer.

    What an op forgets to write, or reads before writing, then shows in its result.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


class Fenced:
    """A tensor inside a larger buffer of canaries, for outputs: ``check`` says what was overrun.

    view: the tensor, full of NaN, of the shape asked for. Its rows (last dimension) are ``gap``
    elements apart, so a kernel that ignores strides runs into the fence too.
    """

    CANARY = 0x5A

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        gap: int = 0,
        margin: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        *rows, width = shape
        num_rows = torch.Size(rows).numel()
        size = 2 * margin + num_rows * (width + gap)
        item = dtype.itemsize
        self._bytes = torch.full((size * item,), self.CANARY, dtype=torch.uint8, device=device)
        body = self._bytes.view(dtype)[margin : size - margin]
        self.view = body.view(*rows, width + gap)[..., :width]
        self.view.fill_(torch.nan)
        inside = torch.zeros(size, dtype=torch.bool, device=device)
        inside[margin : size - margin].view(*rows, width + gap)[..., :width] = True
        self._outside = ~inside
        self._item = item
        self._margin = margin

    def check(self) -> None:
        """Raise AssertionError when anything outside the view was written."""
        canaries = self._bytes.view(-1, self._item)[self._outside]
        broken = (canaries != self.CANARY).any(1)
        if broken.any():
            where = self._outside.nonzero()[:, 0][broken] - self._margin
            raise AssertionError(
                f"{int(broken.sum())} elements outside the output were written, the first at "
                f"element {int(where[0])} from its start"
            )


def far_apart(
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A tensor with enormous strides over memory that the system commits only where it is touched.

    Indices past 2^31 elements cost a few pages this way instead of many gigabytes, so 32-bit index
    arithmetic in a kernel shows on any machine. The content is zero. On a GPU it takes the memory.
    """
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if torch.device(device).type != "cpu":
        return torch.zeros(last + 1, dtype=dtype, device=device).as_strided(shape, stride)
    num_bytes = (last + 1) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, num_bytes, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)
