"""What a chat template may still use of time and memory, and what an operation would cost, worked out before it runs.

A value's size is the full extent of what writing or comparing it can take: a list's elements, theirs, and so on, each
as often as it is met. Keeping every value below a limit keeps every single operation short; charging all that is made
against a total keeps the memory small; and checking a deadline between operations keeps the whole short.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from string import Formatter
from typing import Any

TIME_LIMIT_S = 1.0
SIZE_LIMIT = 4 << 20  # characters of one value or of the output, for an empty conversation
INTEGER_BITS = 64
_INPUT_FACTOR = 8  # … and this much more for every character of the conversation
_TOTAL_FACTOR = 8  # all values made together, in limits of one
ELEMENT = 64  # what an element of a list or dictionary counts for, in characters
_PATTERN = 64  # longest argument of methods whose worst case is its length times the text's
_SLOW_METHODS = frozenset(("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"))
_WIDTH = re.compile(r"\d{4}")


class LimitError(Exception):
    """A template that broke a limit of time or size."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, input_size: int) -> None:
        self.limit = SIZE_LIMIT + _INPUT_FACTOR * input_size
        self._left = _TOTAL_FACTOR * self.limit
        self._end = time.monotonic() + TIME_LIMIT_S
        self._sizes: dict[int, tuple[Any, int]] = {}  # containers cannot change here, so each is measured once

    def tick(self) -> None:
        """Check the deadline."""
        if time.monotonic() > self._end:
            raise LimitError(f"it ran for more than {TIME_LIMIT_S:g} s")

    def fit(self, size: int) -> None:
        """Check the size of one value before or after it is made."""
        if size > self.limit:
            raise LimitError(f"it makes a value of more than {self.limit} characters")

    def admit(self, value: Any) -> Any:
        """Measure and charge a value that was just made; returns it."""
        self.fit(self.size(value))
        return self.charge(value)

    def charge(self, value: Any) -> Any:
        """Charge a value whose full extent is known to fit, as that of a part is; returns it."""
        self.tick()
        self._left -= len(value) if isinstance(value, str) else ELEMENT * _length(value)
        if self._left < 0:
            raise LimitError(f"it makes more than {_TOTAL_FACTOR * self.limit} characters in all")
        return value

    def size(self, value: Any) -> int:
        """An upper bound, in units of a character, of what writing or comparing the whole of `value` can take."""
        if isinstance(value, str):
            return len(value)
        if not is_container(value):
            return ELEMENT
        known = self._sizes.get(id(value))
        if known is None:
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known = value, ELEMENT * _length(value) + sum(map(self.size, parts))
            self._sizes[id(value)] = known
        return known[1]


def is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set, frozenset, type({}.keys()), type({}.values()), type({}.items())))


def _length(value: Any) -> int:
    return 1 + (len(value) if is_container(value) else 0)


_current = threading.local()


@contextmanager
def budget(value: Budget) -> Iterator[None]:
    """Let the rendering of this thread use `value`."""
    _current.budget = value
    try:
        yield
    finally:
        del _current.budget


def current() -> Budget:
    found: Budget = _current.budget
    return found


def data_size(variables: Mapping[str, Any]) -> int:
    """The characters in a template's variables, which must be plain data."""
    return Budget(0).size(dict(variables))


def check_method(name: str, text: str, args: tuple[Any, ...], named: Iterable[Any] = ()) -> tuple[Any, ...]:
    """Measure a call of a string's method before it runs; returns the positional arguments to run it with."""
    limits = current()
    if name in _SLOW_METHODS and any(isinstance(value, str) and len(value) > _PATTERN for value in (*args, *named)):
        raise LimitError(f"{name} takes at most {_PATTERN} characters")
    if name == "join" and len(args) == 1:
        items = list(args[0])
        check_join(text, items)
        return (items,)
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        limits.fit(len(text) + text.count(args[0]) * len(args[1]))
    return args


def check_join(separator: str, items: list[Any]) -> None:
    limits = current()
    limits.fit(len(separator) * len(items) + sum(map(limits.size, items)))


def check_format(text: str, mark: str, values: Any) -> None:
    """Widths of up to three digits only, so that a conversion adds at most 1,000 characters to what it writes."""
    if mark == "{":
        specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
        if any("{" in spec for spec in specs):
            raise LimitError("its format string has a field inside a field")
    else:
        specs = text.split("%")[1:]
        if any("*" in spec for spec in specs):
            raise LimitError("its format string takes a width from its arguments")
    if any(_WIDTH.search(spec) for spec in specs):
        raise LimitError("its format string has a width of more than three digits")
    limits = current()
    limits.fit(len(text) + text.count(mark) * (1000 + limits.size(values)))


def check_product(left: Any, right: Any) -> None:
    limits = current()
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and (isinstance(value, str) or is_container(value)):
            limits.fit(limits.size(value) * times)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > INTEGER_BITS:
        raise LimitError(f"it makes a number of more than {INTEGER_BITS} bits")
