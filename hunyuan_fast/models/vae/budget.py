"""Amounts of memory in words: "6GiB", "500MB", or a number of bytes."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


def read_bytes(amount: int | str, name: str = "memory_budget") -> int:
    """A positive number of bytes, given as such or as text such as "6GiB", "500 MB" or "1.5gib".

    Raises TypeError or ValueError naming `name`.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, str)):
        raise TypeError(
            f'{name} must be a number of bytes or a text such as "6GiB", got '
            f"{type(amount).__name__}"
        )
    count = amount if isinstance(amount, int) else _from_text(amount, name)
    if count < 1:
        raise ValueError(f"{name} must be positive, got {amount}")
    return count


def _from_text(text: str, name: str) -> int:
    found = _AMOUNT.fullmatch(text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(
            f"{name} must be a number and a unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), such as "
            f'"6GiB", got {text!r}'
        )
    return int(float(found[1]) * unit)


def show_bytes(count: int, *, up: bool = False) -> str:
    """A number of bytes in GiB, MiB or KiB; with `up` rounded up, so that it may be asked for."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            digits = 100 if power == 30 else 1
            scaled = count * digits / (1 << power)
            rounded = math.ceil(scaled) if up else round(scaled)
            return f"{rounded / digits:.2f}{unit}" if power == 30 else f"{rounded}{unit}"
    return f"{count}B"
