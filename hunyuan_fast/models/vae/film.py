"""A feature map kept frame by frame, so that each frame can go as soon as it has been used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from hunyuan_fast.models.vae.layers import Rows


class Film:
    """The frames (1, C, 1, H, W) of a map, written and read in order, whole or in strips.

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
                kept = self._new(tuple(frame.shape), x)
                kept.copy_(frame)
            else:
                # a view would keep the whole tensor it is part of
                alone = frame.untyped_storage().nbytes() == frame.numel() * frame.itemsize
                kept = frame if alone else frame.clone()
            self._frames.append(kept)

    def fill(self, start: int, rows: Rows, height: int, x: Tensor) -> None:
        """Copy x (1, C, n, h, W) to these rows of frames of `height` from `start` on."""
        self._device = x.device
        for index, part in enumerate(x.split(1, dim=2), start):
            if index == len(self._frames):
                shape = (*part.shape[:3], height, part.shape[4])
                self._frames.append(self._new(shape, x))
            frame = self._frames[index]
            assert frame is not None, "a frame was written after it had been given up"
            frame[:, :, :, slice(*rows)] = part

    def _new(self, shape: tuple[int, ...], x: Tensor) -> Tensor:
        place = {"device": "cpu", "pin_memory": x.is_cuda} if self._parked else {"device": x.device}
        return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d, **place)

    def read(self, start: int, stop: int, *, last: bool, rows: Rows | None = None) -> Tensor:
        """Frames start to stop, or rows of them; with `last` they are given up."""
        frames = [self._frames[index] for index in range(start, stop)]
        if rows is not None:
            frames = [None if f is None else f[:, :, :, slice(*rows)] for f in frames]
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
