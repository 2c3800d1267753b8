"""What tasks check of their arguments, each kind in one place. RequestError names what is wrong and what is right."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from millis.types import RequestError, brief

LONGEST_MS = 1e9  # of a deadline: eleven days


def deadline(value: float | None) -> float | None:
    """Milliseconds above 0, or no deadline."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= LONGEST_MS:
        raise RequestError(
            f"deadline_ms must be a positive number of milliseconds, at most {LONGEST_MS:g}, not {brief(value)}"
        )
    return float(value)


def sequence(value: Iterable[Any], what: str) -> list[Any]:
    """The items of a list, or of what is like one: neither the characters of a text nor the keys of a mapping."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{what} must be a list, not {brief(value)}")
    return list(value)


def text(value: str, what: str) -> str:
    """A text of at least one word."""
    if not isinstance(value, str):
        raise RequestError(f"{what} must be a str, not {type(value).__name__}")
    if not value.strip():
        raise RequestError(f"{what} is empty; give at least one word")
    return unicode(value, what)


def unicode(value: str, what: str) -> str:
    """A text that can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} holds a lone surrogate at position {error.start}; send valid Unicode") from None
    return value


def texts(given: str | Sequence[str]) -> tuple[list[str], bool]:
    """(the texts, whether it was one)."""
    if isinstance(given, str):
        return [text(given, "the text")], True
    return [text(one, f"text {i}") for i, one in enumerate(sequence(given, "texts"))], False


def strings(value: Iterable[str], what: str) -> list[str]:
    """A list of texts, be they empty."""
    found = sequence(value, what)
    for i, one in enumerate(found):
        if not isinstance(one, str):
            raise RequestError(f"{what} must be a list of texts, not of {type(one).__name__}")
        unicode(one, f"number {i} of {what}")
    return found


def pairs(value: Iterable[tuple[str, str]], what: str) -> list[tuple[str, str]]:
    """A list of pairs of texts, such as (text, label)."""
    found = []
    for i, pair in enumerate(sequence(value, what)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RequestError(f"{what} must be (text, label) pairs; number {i} is {brief(pair)}")
        found.append((unicode(pair[0], f"number {i} of {what}"), unicode(pair[1], f"number {i} of {what}")))
    return found


def template(value: str | None, *places: str, what: str = "template") -> str | None:
    """A question of one's own, with all `places` in it; None: there is none."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(f"the {what} must be a str, not {type(value).__name__}")
    for place in places:
        if place not in value:
            raise RequestError(f"the {what} must hold {place}")
    return unicode(value, f"the {what}")


def path(value: str | os.PathLike[str], what: str) -> Path:
    """Where a file is."""
    if not isinstance(value, (str, os.PathLike)):
        raise RequestError(f"{what} must be a path, not {brief(value)}")
    return Path(value)
