"""Who holds which rows, where nothing has to divide anything."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


def split_sizes(length: int, parts: int) -> tuple[int, ...]:
    """Sizes of ``parts`` adjacent parts of ``length``: the first ``length % parts`` one longer.

    Parts may be empty. Raises ValueError for a negative length or fewer than one part.
    """
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    # each by itself: a compiler that has the length as a symbol gets sizes for all lengths
    return tuple((length + parts - 1 - index) // parts for index in range(parts))


def starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each part begins."""
    return tuple(accumulate(sizes, initial=0))[:-1]


def part(sizes: tuple[int, ...], index: int) -> slice:
    """The rows of one part."""
    start = sum(sizes[:index])
    return slice(start, start + sizes[index])


@dataclass(frozen=True)
class TokenShards:
    """How the joint sequence of video and text lies on the ranks of a context-parallel group.

    Every rank holds some adjacent video tokens, and behind them some adjacent text tokens. Text is
    valid from its beginning, so the valid rows of a rank are a prefix of what it holds.

    video, text: rows of each rank, of equal length
    """

    video: tuple[int, ...]
    text: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.video) != len(self.text):
            raise ValueError(
                "video and text must have a size for each rank, "
                f"got {len(self.video)} and {len(self.text)}"
            )

    @classmethod
    def split(cls, num_video: int, num_text: int, ranks: int) -> TokenShards:
        """Both kinds of tokens in about equal parts."""
        return cls(split_sizes(num_video, ranks), split_sizes(num_text, ranks))

    @property
    def rows(self) -> tuple[int, ...]:
        """All rows of each rank."""
        return tuple(v + t for v, t in zip(self.video, self.text, strict=True))

    def kv_len(self, text_len: Tensor) -> Tensor:
        """Valid rows of each rank and sample, (ranks, B) int32, on the device of text_len.

        text_len: (B,), valid text tokens of each sample, counted over all ranks
        """
        device = text_len.device
        first, most, video = (
            torch.tensor(numbers, dtype=torch.int32, device=device)[:, None]
            for numbers in (starts(self.text), self.text, self.video)
        )
        here = (text_len.to(torch.int32)[None] - first).clamp(min=0)
        return video + torch.minimum(here, most)

    def merged(self, ranks_together: int) -> TokenShards:
        """The same when every ``ranks_together`` adjacent ranks are taken as one."""
        count = len(self.video)
        if ranks_together < 1 or count % ranks_together:
            raise ValueError(f"ranks_together must divide the {count} ranks, got {ranks_together}")
        groups = range(0, count, ranks_together)
        video, text = (
            tuple(sum(sizes[at : at + ranks_together]) for at in groups)
            for sizes in (self.video, self.text)
        )
        return TokenShards(video, text)
