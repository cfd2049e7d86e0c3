"""A feature map kept frame by frame, so that each frame can go as soon as it has been used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class Film:
    """The frames (1, C, 1, H, W) of a map, written and read in order.

    parked: frames wait in host memory, pinned where the device is a GPU, and come back on reading.
    """

    def __init__(self, *, parked: bool = False) -> None:
        self._parked = parked
        self._device: torch.device | None = None
        self._frames: deque[Tensor | None] = deque()

    def append(self, x: Tensor) -> None:
        """Copy the frames of x (1, C, n, H, W) to the end."""
        self._device = x.device
        for frame in x.split(1, dim=2):
            if self._parked:
                kept = torch.empty_like(frame, device="cpu", pin_memory=x.is_cuda)
                kept.copy_(frame)
            else:
                # a view would keep the whole tensor it is part of
                alone = frame.untyped_storage().nbytes() == frame.numel() * frame.itemsize
                kept = frame if alone else frame.clone()
            self._frames.append(kept)

    def read(self, start: int, stop: int, *, last: bool) -> Tensor:
        """Frames start to stop; with `last` they are given up."""
        frames = [self._frames[index] for index in range(start, stop)]
        if last:
            for index in range(start, stop):
                self._frames[index] = None
        found = [frame for frame in frames if frame is not None]
        assert len(found) == stop - start, "a frame was read after it had been given up"
        if self._parked:
            found = [frame.to(self._device) for frame in found]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def __len__(self) -> int:
        return len(self._frames)


def spans(frames: int, length: int) -> Iterator[tuple[int, int]]:
    """Start and stop of pieces of at most `length` frames."""
    for start in range(0, frames, length):
        yield start, min(start + length, frames)
