"""One line of the table that says what a parameter is called in another layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How one native parameter is stored in the diffusers layout.

    native: our parameter name, which is the official checkpoint's.
    diffusers: the names of its parts, in the order in which they lie along dimension 0.
    rows: the size along dimension 0 of each part.
    swap_halves: the only part holds the two halves of dimension 0 in the opposite order.
    """

    native: str
    diffusers: tuple[str, ...]
    rows: tuple[int, ...]
    swap_halves: bool = False

    def __post_init__(self) -> None:
        if not self.diffusers or len(self.diffusers) != len(self.rows):
            raise ValueError(f"rule of {self.native}: one number of rows per diffusers name")
        if self.swap_halves and (len(self.rows) != 1 or self.rows[0] % 2):
            raise ValueError(f"rule of {self.native}: halves swap within one even part")

    def views(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each diffusers name with the rows of the native `tensor` that it holds, as a view."""
        yield from zip(self.diffusers, tensor.split(list(self.rows)), strict=True)
