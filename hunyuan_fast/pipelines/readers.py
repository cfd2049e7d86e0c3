"""Readers of single arguments: each returns a plain value or raises an error with advice.

A message has four parts: the argument, what was expected, what was given, and the way out.
"""

import math
import operator
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80

Reader = Callable[[str, Any], Any]


def show(value: Any) -> str:
    """Short form of a value on one line, for an error message."""
    # Python refuses to write an integer of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"about 2**{value.bit_length()}"
    return " ".join(_SHORT.repr(value).split())


def wrong_type(name: str, expected: str, value: Any, advice: str = "") -> NoReturn:
    """Raise TypeError for an argument of the wrong type."""
    raise TypeError(
        _message(name, expected, f"{show(value)} of type {type(value).__name__}", advice)
    )


def wrong_value(name: str, expected: str, value: Any, advice: str = "") -> NoReturn:
    """Raise ValueError for an argument of the right type with a value that cannot be used."""
    raise ValueError(_message(name, expected, show(value), advice))


def _message(name: str, expected: str, got: str, advice: str) -> str:
    return f"{name} must be {expected}, got {got}" + (f"; {advice}" if advice else "")


@dataclass(frozen=True)
class Integer:
    """Whole number from least to most, of the form multiple * n + remainder.

    9.0, "9" and True are refused.
    """

    least: int
    most: int
    multiple: int = 1
    remainder: int = 0
    unit: str = ""

    def __call__(self, name: str, value: Any) -> int:
        if isinstance(value, bool):
            wrong_type(name, f"an integer ({self.expected})", value)
        try:
            number = operator.index(value)
        except TypeError:
            wrong_type(name, f"an integer ({self.expected})", value)
        if not self.least <= number <= self.most or (number - self.remainder) % self.multiple:
            wrong_value(name, self.expected, number, self._advice(number))
        return number

    @property
    def expected(self) -> str:
        form = ""
        if self.remainder:
            form = f"{self.multiple}n + {self.remainder}, "
        elif self.multiple > 1:
            form = f"a multiple of {self.multiple}, "
        return f"{form}from {self.least} to {self.most}{self.unit}"

    def _advice(self, number: int) -> str:
        if self.multiple == 1:
            return ""
        inside = min(max(number, self.least), self.most)
        below = inside - (inside - self.remainder) % self.multiple
        near = [n for n in (below, below + self.multiple) if self.least <= n <= self.most]
        if below == inside:
            near = [below]
        return f"nearest valid: {' or '.join(str(n) for n in near)}"


@dataclass(frozen=True)
class Number:
    """Finite real number from least to most; with `above`, larger than least."""

    least: float
    most: float
    above: bool = False
    advice: str = ""

    def __call__(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            wrong_type(name, f"a number ({self.expected})", value, self.advice)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        low = number <= self.least if self.above else number < self.least
        if not math.isfinite(number) or low or number > self.most:
            wrong_value(name, self.expected, number, self.advice)
        return number

    @property
    def expected(self) -> str:
        lower = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        return f"{lower} and at most {self.most:g}"


@dataclass(frozen=True)
class Choice:
    """One of a few strings."""

    options: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str:
        expected = "one of " + ", ".join(repr(option) for option in self.options)
        if not isinstance(value, str):
            wrong_type(name, expected, value)
        if value not in self.options:
            wrong_value(name, expected, value)
        return value


@dataclass(frozen=True)
class Text:
    """A prompt: a string that can be written as UTF-8, of bounded length, also empty."""

    most: int

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            advice = (
                "decode it first, as in prompt.decode('utf-8')" if isinstance(value, bytes) else ""
            )
            wrong_type(name, "a string", value, advice)
        if len(value) > self.most:
            raise ValueError(
                f"{name} must have at most {self.most} characters, got {len(value)}; shorten it"
            )
        if "\x00" in value or any("\ud800" <= char <= "\udfff" for char in value):
            wrong_value(
                name, "text without NUL and lone surrogates", value, "remove these characters"
            )
        return value


@dataclass(frozen=True)
class Optional:
    """None, or what the inner reader accepts."""

    inner: Reader

    def __call__(self, name: str, value: Any) -> Any:
        return None if value is None else self.inner(name, value)


def callback(name: str, value: Any) -> Callable[[str, int, int], None]:
    """A function progress(stage, step, total)."""
    if not callable(value):
        wrong_type(name, "a function of (stage, step, total)", value)
    return value
